"""SplitQuant (ICLR 2026 submission 23537): in-channels cut into slices that share a learned Kronecker transform, one scale a token and
one a channel, no low-rank branch: the product is a plain INT4 GEMM.

    x / s = [x_1 .. x_S], x_i as a matrix (p1, p2);  z_i = P1^T x_i P2;  y = sum_i s_x s_w (q(z_i) . q(W_i s P^-T)) + b

Training is by layer here, on the layer's own output; `steps` 0 is the zero-training preset: P is a Hadamard-like orthogonal start. What
the paper has beyond it (block outputs, losses by stream and timestep) is not in this version.
"""

from dataclasses import dataclass

import torch

from ..quantizers import absmax_scale, code_range, dequantize, grouped, quantize
from ..spec import ActivationSpec, PartSpec, WeightSpec
from ..transforms import fold_weight, hadamard, kronecker, transform_activation
from . import gptq
from .parts import column_absmax, fit_parts, folded_t, round_part, smoothing
from .problem import Fitted, Problem, row_chunks

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


class NoBalancedFactors(ValueError):
    """A width that cannot be cut as asked."""


@dataclass(frozen=True)
class SplitQuantConfig:
    """slices: of each part of a layer, fewer where one would have less than `least` channels; per_slice: a transform for each.
    transform: "identity", "orthogonal" (start and, trained, Cayley) or "affine" (U diag V^T). smooth: candidates (alpha, beta) of
    absmax(x)^alpha / absmax(w)^beta. clip: fit the range of activations; off, since on the small FLUX it gains 1 dB a layer and loses
    1 dB of the picture: what is cut off is a bias, which adds up over the steps.
    steps: of AdamW on the layer's output, at `rate` with a cosine; `rows`: out-channels a step looks at. tokens: held-out tokens to fit.
    gptq: also try it. rank: of weight-only layers, the others have no branch.
    """

    slices: int = 4
    least: int = 256
    per_slice: bool = False
    transform: str = "orthogonal"
    smooth: tuple = ((0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (0.65, 0.35), (0.8, 0.2))
    clip: bool = False
    steps: int = 0
    rate: float = 5e-3
    rows: int = 512
    tokens: int = 512
    gptq: bool = True
    rank: int = 32
    damp: float = 0.01
    seed: int = 0


def balanced(width: int) -> tuple[int, int]:
    """p1 <= p2 with p1 p2 = width, as close to each other as there are. Raises NoBalancedFactors for a prime above 3."""
    p1 = max(i for i in range(1, int(width**0.5) + 1) if width % i == 0)
    if p1 == 1 and width > 3:
        raise NoBalancedFactors(f"{width} channels a slice have no factors but 1; the nearest that do are {width - 1} and {width + 1}")
    return p1, width // p1


def slice_width(width: int, slices: int) -> int:
    """Channels of a slice. Raises NoBalancedFactors where `slices` does not divide the width, naming the nearest that do."""
    if width % slices:
        near = sorted((s for s in range(1, width // 2) if width % s == 0), key=lambda s: abs(s - slices))[:2]
        raise NoBalancedFactors(f"{slices} slices do not divide {width} channels; the nearest that do: {' and '.join(map(str, near))}")
    return width // slices


def start_factor(size: int, seed: int) -> torch.Tensor:
    """An orthogonal (size, size) that spreads each channel over all: Hadamard where size is a power of two, else a random one."""
    if size > 1 and size & (size - 1) == 0:
        return hadamard(size)
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def fit(problem: Problem, config: SplitQuantConfig) -> Fitted:
    """Fits each part of the layer on its own. Without statistics: the start, no smoothing, no clip."""
    return fit_parts(problem, lambda part: _Part(problem, part, config).fit())


class _Part:
    def __init__(self, problem, part, config):
        self.config, self.part, self.dtype = config, part, problem.dtype
        self.weight = problem.weight[:, part.start : part.stop]
        width = self.weight.shape[1]
        room = max(1, width // config.least)
        self.slices = config.slices if config.slices <= room else max(s for s in range(1, room + 1) if width % s == 0)
        self.sizes = balanced(slice_width(width, self.slices)) if config.transform != "identity" else ()
        self.absmax = None if problem.statistics is None else problem.statistics.absmax[part.start : part.stop].to(self.weight.device)
        hessians = {} if problem.statistics is None else problem.statistics.hessians
        self.hessians = {b: h for b, h in hessians.items() if part.start <= b[0] < part.stop}
        tokens = problem.tokens("select")
        self.x = None if tokens is None else tokens[: config.tokens, part.start : part.stop]

    def fit(self):
        factors = self._start()
        if self.x is None:
            return self._finished(None, factors, 1.0), {"data": "none"}
        smooth, label = min(self._smooths(), key=lambda s: self._rough_error(s[0], factors))
        clip, chosen = 1.0, {"smooth": label}
        if self.config.steps and self.sizes:
            before = self._rough_error(smooth, factors)
            chosen["transform"] = "start"  # kept where training diverges, or is no better on its own tokens
            if (trained := train(self.x, self.weight, smooth, factors, self.config)) is not None:
                after = (trained[0].to(self.dtype).float(), self._stored(trained[1]))
                if self._rough_error(*after) < before:
                    (smooth, factors), chosen["transform"] = after, "trained"
        if self.config.clip:
            clip = min(CLIPS, key=lambda c: self._rough_error(smooth, factors, c))
            chosen["clip"] = f"{clip:g}"
        best = self._finished(smooth, factors, clip)
        if self.config.gptq and (other := self._gptq(best)) is not None and self._error(other) < self._error(best):
            best, chosen["rounding"] = other, "gptq"
        return best, chosen

    def _start(self):
        if not self.sizes:
            return None
        pairs = self.slices if self.config.per_slice else 1
        made = [start_factor(size, self.config.seed + i) for i, size in enumerate(self.sizes)]
        return self._stored(tuple(f.expand(pairs, -1, -1).to(self.weight.device) for f in made))

    def _stored(self, factors):
        """As a file will hold them, so that W is folded with the inverse of just that."""
        return tuple(f.to(self.dtype).float() for f in factors)

    def _smooths(self):
        w = column_absmax(self.weight)
        for alpha, beta in self.config.smooth:
            yield smoothing(self.absmax, w, alpha, beta, self.dtype), f"absmax {alpha:g}/{beta:g}"

    def _seen(self, smooth, factors, clip):
        """The fit tokens as the product sees them: transformed, rounded, and real values again."""
        tx = transform_activation(self.x, smooth, 0, factors=factors)
        scale = absmax_scale(tx, 4, "token", clip=clip)
        return dequantize(quantize(tx, scale, 4, "token"), scale, "token")

    def _rough_error(self, smooth, factors, clip=1.0) -> float:
        """Of the output on the fit tokens, on every n-th out-channel."""
        weight = self.weight[:: max(1, len(self.weight) // self.config.rows)].float()
        folded = fold_weight(weight, smooth, 0, factors)
        scale = absmax_scale(folded, 4, "channel")
        rounded = dequantize(quantize(folded, scale, 4, "channel"), scale, "channel")
        return float((self.x @ weight.T - self._seen(smooth, factors, clip) @ rounded.T).double().square().sum())

    def _finished(self, smooth, factors, clip):
        spec = PartSpec(
            self.part.start, self.part.stop, WeightSpec(4, "channel"), ActivationSpec(4, "token", clip=clip), smooth=smooth is not None,
            kronecker=self.sizes, per_slice=self.config.per_slice and bool(self.sizes),
        )  # fmt: skip
        codes, scales = round_part(self.weight, spec, smooth, torch.float32, factors=factors)
        return {"spec": spec, "codes": codes, "scales": scales, "smooth": smooth, "low_rank": None, "factors": factors}

    def _gptq(self, nearest):
        """The same part rounded by GPTQ at the same scales; None without second moments, or where their blocks cut a slice."""
        smooth, factors, upper = nearest["smooth"], nearest["factors"], {}
        step = self.sizes[0] * self.sizes[1] if self.sizes else 1
        for (start, stop), h in sorted(self.hessians.items()):
            a, b = start - self.part.start, stop - self.part.start
            if a % step or (b - a) % step:
                return None
            pick = slice(a // step, b // step) if self.config.per_slice else slice(None)
            local = None if factors is None else tuple(f[pick] for f in factors)
            h = h.to(self.weight.device, torch.float32)
            for _ in range(2):  # T H T^T
                h = transform_activation(h, None if smooth is None else smooth[a:b], 0, factors=local).T
            upper[a, b] = gptq.upper_factor(h.contiguous(), self.config.damp)
        if not upper:
            return None
        rest = folded_t(self.weight, nearest["spec"], smooth, factors=factors)
        codes, _ = gptq.quantize(rest, upper, 4, rest.shape[0], torch.float32, scales=nearest["scales"].T.contiguous())
        return nearest | {"codes": codes.T.contiguous()}

    def _error(self, part) -> float:
        """Energy of the output's error on the fit tokens, with the codes as they are."""
        tx, error = self._seen(part["smooth"], part["factors"], part["spec"].activation.clip), 0.0
        for rows in row_chunks(*self.weight.shape):
            weight = dequantize(part["codes"][rows], part["scales"][rows], "channel")
            error += (self.x @ self.weight[rows].float().T - tx @ weight.T).double().square().sum().item()
        return error


# -- training --------------------------------------------------------------------------------------------------------------


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (rows, K) rounded to 4 bits at scale (rows, 1); the gradient passes straight through inside the range, and reaches the scale."""
    low, top = code_range(4)
    y = (x / scale).clamp(low, top)
    return (y + (y.round() - y).detach()) * scale


def cayley(a: torch.Tensor) -> torch.Tensor:
    """The orthogonal (I - S)(I + S)^-1 of the skew part S = A - A^T of A (..., n, n)."""
    skew, eye = a - a.mT, torch.eye(a.shape[-1], device=a.device)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


class _Factor(torch.nn.Module):
    """One Kronecker factor: start @ Cayley, or with `affine` start @ Cayley diag(exp d) Cayley'."""

    def __init__(self, start, affine):
        super().__init__()
        self.register_buffer("start", start.clone())
        self.u = torch.nn.Parameter(torch.zeros_like(start))
        self.v = torch.nn.Parameter(torch.zeros_like(start)) if affine else None
        self.d = torch.nn.Parameter(start.new_zeros(start.shape[:-1])) if affine else None

    def both(self):
        """(P, P^-T): the inverse is free."""
        p = self.start @ cayley(self.u)
        if self.v is None:
            return p, p
        v, d = cayley(self.v), self.d.exp()
        return (p * d[..., None, :]) @ v, (p / d[..., None, :]) @ v


def train(x, weight, smooth, factors, config):
    """(smooth (K,), factors) after `steps` of AdamW on the output of the layer; None where the loss is not finite.

    x (R, K), weight (N, K). A step looks at `rows` out-channels drawn anew. Smoothing, rotation and the range of x (a sigmoid, from
    0.98) are learned together, the range at 10 times the rate (FlatQuant).
    """
    g = torch.Generator().manual_seed(config.seed)
    with torch.inference_mode(False), torch.enable_grad():
        x, pieces = x.clone(), torch.nn.ModuleList(_Factor(f, config.transform == "affine") for f in factors).to(x.device)
        log_s, clip = torch.nn.Parameter(smooth.log()), torch.nn.Parameter(torch.full((), 4.0, device=x.device))
        groups = [{"params": [*pieces.parameters(), log_s], "lr": config.rate}, {"params": [clip], "lr": 10 * config.rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, eta_min=0.05 * config.rate)
        for _ in range(config.steps):
            picked = torch.randperm(len(weight), generator=g)[: config.rows].to(weight.device)
            w = weight[picked].float()
            (p1, i1), (p2, i2) = (f.both() for f in pieces)
            s = log_s.exp()
            tx, tw = kronecker(x / s, p1, p2), kronecker(w * s, i1, i2)
            a_scale = grouped(tx, "token").abs().amax(-1).clamp(min=1e-8) * clip.sigmoid() / 7
            w_scale = grouped(tw, "channel").abs().amax(-1).clamp(min=1e-8) / 7
            want = x @ w.T
            loss = (fake_quantize(tx, a_scale) @ fake_quantize(tw, w_scale).T - want).square().mean() / want.square().mean()
            if not torch.isfinite(loss):
                return None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            s = log_s.exp()
            return s / s.log().mean().exp(), tuple(f.both()[0].detach() for f in pieces)
