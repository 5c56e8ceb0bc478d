"""Streaming statistics of one layer input."""

import math
import zlib
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from .moments import add_upper, mirror

# Of one call. A picture of 1024 x 1024 has at most 4.6 thousand tokens in FLUX, 81 frames of 480p have 32760
# in Wan: there the second moments of a call cost a quarter of the time, and the fp32 copy of the MLP's input
# 0.45 instead of 1.8 GB.
TOKENS = 8192
FP32 = torch.finfo(torch.float32).max


class NonFiniteActivation(ValueError):
    """NaN, Inf or what becomes Inf in the second moments at the input of a layer."""


def hessian_blocks(parts, limit: int) -> tuple[tuple[int, int], ...]:
    """Ranges of in-channels with a second-moment matrix of their own: the parts, cut to at most `limit`
    channels, evenly where no group of 64 is split by it."""
    out = []
    for start, stop in parts:
        groups = -(-(stop - start) // 64)  # the last may be short
        pieces = -(-groups // max(1, limit // 64))
        # 8960 in-channels (Wan 1.3B) are 140 groups: four blocks of 35 are even, three are not.
        even = next((p for p in range(pieces, 2 * pieces) if groups % p == 0), pieces)
        edges = [start + 64 * (groups * i // even) for i in range(even)] + [stop]
        out += list(pairwise(edges))
    return tuple(out)


def reservoir_keys(seed: int, name: str, sample: int, step: int, call: int, count: int) -> torch.Tensor:
    """One uniform number a token, a function of its place in the calibration alone, whatever ran before."""
    state = zlib.crc32(f"{seed}/{name}/{sample}/{step}/{call}".encode())
    return torch.rand(count, generator=torch.Generator().manual_seed(state), dtype=torch.float64)


def peaks_of(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each channel of x (tokens, K) with at least one token: (K,) fp32, where x is;
    NaN where a channel has one.

    Two reductions take 4.7 ms for 1152 tokens of 5120 channels on a CPU, where `x.abs().amax(0)` takes 18.5.
    """
    return torch.maximum(-x.amin(0), x.amax(0)).float()


def _on(device, indices: torch.Tensor) -> torch.Tensor:
    """Indices from the CPU, copied without waiting for what the device has to do before."""
    return indices.to(device, non_blocking=True)


@dataclass
class InputStatistics:
    """What is known of x (tokens, K) at the input of one or more layers.

    Fit tokens: `count`, `absmax` (K,) fp32, `hessians` {(start, stop): X^T X fp32}. Held-out tokens, which no
    fit sees (with a single sample they are the fit tokens): `tokens` (R, K) bf16 with their `keys` (R,) fp64
    and `timesteps` (R,) fp32, the R smallest keys of all (bottom-k sampling: uniform, independent of the
    order, mergeable). Memory: 4 K sum(width^2 / K) + 2 R K bytes; 38 MB + 6 MB at K = 3072 with R = 1024.
    """

    name: str
    width: int
    blocks: tuple[tuple[int, int], ...]
    reservoir: int
    count: int
    absmax: torch.Tensor
    hessians: dict
    tokens: torch.Tensor
    keys: torch.Tensor
    timesteps: torch.Tensor
    _offered: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list, init=False, repr=False
    )

    @classmethod
    def empty(cls, name, width, blocks, reservoir=1024):
        return cls(
            name,
            width,
            tuple(blocks),
            reservoir,
            0,
            torch.zeros(width),
            {},
            torch.zeros(0, width, dtype=torch.bfloat16),
            torch.zeros(0, dtype=torch.float64),
            torch.zeros(0),
        )

    @staticmethod
    def nbytes(width, blocks, reservoir=1024) -> int:
        """The bound on memory of one input's statistics."""
        return 4 * sum((b - a) ** 2 for a, b in blocks) + 2 * width * reservoir + 4 * width

    def update(self, x: torch.Tensor, keys: torch.Tensor | None = None):
        """Adds fit tokens x (..., K). Of more than TOKENS of them the second moments see those with the
        smallest `keys`, absmax all. A call without tokens adds nothing."""
        x = x.reshape(-1, self.width)
        if len(x):
            self.add(x, peaks_of(x), keys)
            self.mirror()

    def mirror(self):
        """Completes the second moments after the last `add`."""
        for hessian in self.hessians.values():
            mirror(hessian)

    def add(self, x: torch.Tensor, peaks: torch.Tensor, keys: torch.Tensor | None = None):
        """`update` for one call of many with x (tokens, K) and its `peaks_of`: the second moments are the
        upper triangles alone until `mirror`. The host waits for nothing here."""
        self.to(x.device)
        torch.maximum(self.absmax, peaks, out=self.absmax)
        if keys is not None and len(x) > TOKENS:
            x = x[_on(x.device, keys.topk(TOKENS, largest=False).indices.sort().values)]
        for (start, stop), hessian in self.hessians.items():
            add_upper(hessian, x[:, start:stop])
        self.count += x.shape[0]

    def padded(self, count: int) -> "InputStatistics":
        """With `count` channels of zeros behind the others; the last block of second moments takes them
        in."""
        pad, width = torch.nn.functional.pad, self.width + count
        wider = {b: (b[0], width) if b[1] == self.width else b for b in self.blocks}
        hessians = {
            wider[b]: pad(h, (0, count, 0, count)) if b[1] == self.width else h
            for b, h in self.hessians.items()
        }
        absmax, tokens = pad(self.absmax, (0, count)), pad(self.tokens, (0, count))
        return replace(
            self,
            width=width,
            blocks=tuple(wider[b] for b in self.blocks),
            absmax=absmax,
            hessians=hessians,
            tokens=tokens,
        )

    def to(self, device):
        """Moves what fit tokens are added to, or allocates it there: the tokens stay on the CPU."""
        self.absmax = self.absmax.to(device)
        for a, b in self.blocks:
            self.hessians[a, b] = (
                self.hessians[a, b].to(device)
                if (a, b) in self.hessians
                else torch.zeros(b - a, b - a, device=device)
            )

    def hold_out(self, x: torch.Tensor, keys: torch.Tensor, timestep: float):
        """Offers tokens x (..., K), of which there may be none, with their `keys` to the reservoir."""
        self.offer(x.reshape(-1, self.width), keys, timestep)
        self.take_offered()

    def offer(self, x: torch.Tensor, keys: torch.Tensor, timestep: float):
        """`hold_out` for one call of many, with x (tokens, K): the tokens are under way to the CPU until
        `take_offered`."""
        worth = keys.topk(min(self.reservoir, len(keys)), largest=False).indices.sort().values
        if len(self.keys) == self.reservoir:
            worth = worth[keys[worth] < self.keys.max()]
        if not len(worth):
            return
        if len(worth) < len(keys):
            x, keys = x[_on(x.device, worth)], keys[worth]
        tokens = x.to(torch.bfloat16).to("cpu", non_blocking=True, copy=True)
        self._offered.append((tokens, keys, torch.full((len(keys),), timestep)))

    def take_offered(self):
        """Takes in what was offered, once the device has been waited for."""
        for tokens, keys, timesteps in self._offered:
            self._keep(tokens, keys, timesteps)
        self._offered.clear()

    def _keep(self, tokens, keys, timesteps):
        keys = torch.cat([self.keys, keys])
        best = keys.argsort()[: self.reservoir]
        self.keys, self.tokens = keys[best], torch.cat([self.tokens, tokens])[best]
        self.timesteps = torch.cat([self.timesteps, timesteps])[best]

    def merge(self, other: "InputStatistics"):
        """Adds the statistics of another run on the same input."""
        if (self.width, self.blocks) != (other.width, other.blocks):
            raise ValueError(
                f"{self.name}: cannot merge statistics of {self.width} and {other.width} channels, blocks "
                f"{self.blocks} and {other.blocks}"
            )
        torch.maximum(self.absmax, other.absmax, out=self.absmax)
        for key, hessian in other.hessians.items():
            self.hessians[key] = self.hessians[key] + hessian if key in self.hessians else hessian
        self.count += other.count
        self._keep(other.tokens, other.keys, other.timesteps)

    def require_finite(self, peak: float, peaks: torch.Tensor, tokens: int, sample: int, step: int):
        """Raises NonFiniteActivation naming the layer, the channel, the sample and the step, where `peak`,
        the largest of the channels' `peaks` (K,), is NaN or Inf, or so large that the second moments of all
        the `tokens` so far may leave fp32.

        A channel's sum is at most the largest square times the tokens. Only an error reads `peaks`, from the
        device.
        """
        if math.isfinite(peak) and (not self.blocks or peak * peak * tokens < FP32):
            return
        if math.isfinite(peak):
            channel = int(peaks.argmax())
            found, why = (
                f"Values up to {peak:.3g}",
                f"Their squares, summed over {tokens} tokens, overflow fp32",
            )
        else:
            channel = int((~torch.isfinite(peaks)).nonzero()[0])
            found, why = "NaN or Inf", "The model itself overflows there"
        raise NonFiniteActivation(
            f"{found} at the input of layer {self.name}, channel {channel}, sample {sample}, step {step}. "
            f"{why}: try bf16 or fp32 computation, other prompts, or a lower cfg."
        )
