"""One denoising step of a transformer of FLUX.1's shape, in 16 bit and on the pack's operator: the same code,
other linears.

Only time and memory are of interest, so weights are random, positions count along one axis, and the vector of
time and pooled text is given. Attention is torch's; the embedders and the last layer stay in 16 bit, as the
pack leaves them.

What is fused here is what users get and nothing else. The GELU between the two layers of an MLP is computed
in the quantizer, as in a model that ComfyUI has loaded. LayerNorm and modulation are torch's: its blocks
call their norm, then the function `apply_mod`, then the layer, with no module around the three that a patch
could take the place of. Fusing them would mean a forward of our own for each block, in front of which other
packs' patches of these blocks would be lost.
"""

import gc
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

from ....kernels import choose, spec_at_load
from ....kernels.dispatch import quant_linear
from ....kernels.operator.spec import GELU_SHIFT, LinearSpec, PartSpec
from ....kernels.prologue import Gelu
from ....kernels.target import Target, target_of
from ...layer.linear import QuantizedLayer
from ...layer.precisions import in_int8
from .cases import RANK, quantizers, random_tensors
from .timing import median

# Name, out- and in-channels in units of the hidden size, what x is ("gelu": after a GELU, "vector": one row,
# "attn|gelu": both).
STREAM = (
    ("mod", 6, 1, "vector"),
    ("qkv", 3, 1, ""),
    ("proj", 1, 1, ""),
    ("mlp0", 4, 1, ""),
    ("mlp2", 1, 4, "gelu"),
)
SINGLE = (("mod", 3, 1, "vector"), ("linear1", 7, 1, ""), ("linear2", 1, 5, "attn|gelu"))


@dataclass(frozen=True)
class Size:
    """FLUX.1 dev at 1024 x 1024: tokens of the image and of the text, channels of their inputs."""

    batch: int = 1
    hidden: int = 3072
    heads: int = 24
    double: int = 19
    single: int = 38
    image: int = 4096
    text: int = 512
    channels: int = 64
    context: int = 4096


class FloatLinear(nn.Module):
    """A linear layer in 16 bit (or any float dtype)."""

    def __init__(
        self,
        n,
        k,
        kind,
        dtype,
        device,
        generator,
    ):
        super().__init__()
        make = lambda *shape: nn.Parameter(
            torch.randn(*shape, dtype=dtype, device=device, generator=generator) / k**0.5, False
        )
        self.weight, self.bias = make(n, k), make(n)

    def forward(self, x, prologue=None):
        return linear(x if prologue is None else prologue(x), self.weight, self.bias)


class NibbleLinear(nn.Module):
    """The same shape on the pack's operator, with random codes that are made on the device, held in the form
    that a layer of a loaded model has on `target` (`spec_at_load`)."""

    def __init__(
        self,
        spec: LinearSpec,
        dtype,
        device,
        generator,
        target: Target,
    ):
        super().__init__()
        tensors = random_tensors(spec, dtype, device, generator)
        if spec_at_load(spec, target) is not spec:
            made = in_int8(QuantizedLayer("bench", spec, tensors))
            spec, tensors = made.spec, made.tensors
        self.spec, self.names = spec, tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x, prologue=None):
        held = self._buffers
        return quant_linear(x, self.spec, {name: held[name] for name in self.names}, prologue=prologue)


def layer_spec(
    n: int,
    k: int,
    kind: str,
    grain: str,
    lora: int = 0,
) -> LinearSpec:
    """A layer of the model as a file has it; modulation is weight-only.

    grain: "group" for SVDQuant's (groups of 64, smoothed, a low rank), "channel" for ConvRot's (one scale a
    channel, rotated). lora: the rank of one attached to it, 0 for none.
    """
    if kind == "vector":
        return LinearSpec(k, n, (PartSpec(0, k, activation=None, rank=lora),))
    weight, plain = quantizers(grain)
    if grain == "channel":
        size = next(s for s in (256, 64, 16) if k % s == 0)
        return LinearSpec(
            k,
            n,
            (
                PartSpec(
                    0,
                    k,
                    weight,
                    plain,
                    rotation=size,
                    rank=lora,
                ),
            ),
        )
    after_gelu = replace(plain, unsigned=True, shift=GELU_SHIFT)
    edges = {
        "": ((0, k, plain),),
        "gelu": ((0, k, after_gelu),),
        "attn|gelu": ((0, k // 5, plain), (k // 5, k, after_gelu)),
    }[kind]
    part = lambda a, b, act: PartSpec(
        a,
        b,
        weight,
        act,
        smooth=True,
        rank=RANK + lora,
    )
    return LinearSpec(k, n, tuple(part(*edge) for edge in edges))


class Block(nn.Module):
    """The linears of a list, by name, and the scales of the query and key norms."""

    def __init__(
        self,
        layers,
        size,
        make,
        dtype,
        device,
    ):
        super().__init__()
        for name, n, k, kind in layers:
            setattr(self, name, make(n * size.hidden, k * size.hidden, kind))
        for name in ("query", "key"):
            setattr(
                self,
                name,
                nn.Parameter(torch.ones(size.hidden // size.heads, dtype=dtype, device=device), False),
            )

    def heads(self, qkv):
        """(batch, tokens, 3 hidden) -> normed q and k, v, each (batch, heads, tokens, channels of a head)."""
        width = self.query.shape[0]
        q, k, v = qkv.unflatten(-1, (3, -1, width)).permute(
            2,
            0,
            3,
            1,
            4,
        )
        return rms_norm(q, (width,), self.query, 1e-6), rms_norm(k, (width,), self.key, 1e-6), v


def modulated(x, scale, shift):
    """LayerNorm and modulation as ComfyUI computes them. x (batch, tokens, hidden), scale and shift
    (batch, 1, hidden)."""
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Flux(nn.Module):
    """make(n, k, kind) builds the blocks' linears, edge(n, k) those that stay in 16 bit."""

    def __init__(
        self,
        size: Size,
        make,
        edge,
        dtype,
        device,
    ):
        super().__init__()
        h = size.hidden
        self.image_in, self.text_in = edge(h, size.channels), edge(h, size.context)
        block = lambda layers: Block(layers, size, make, dtype, device)
        self.double_blocks = nn.ModuleList(
            nn.ModuleDict({"text": block(STREAM), "image": block(STREAM)}) for _ in range(size.double)
        )
        self.single_blocks = nn.ModuleList(block(SINGLE) for _ in range(size.single))
        self.last_mod, self.last = edge(2 * h, h), edge(size.channels, h)
        self.register_buffer("cos", None)
        self.register_buffer("sin", None)
        self.resize(size)

    def resize(self, size: Size):
        """Takes inputs of this size from now on; the weights stay."""
        self.size, like = size, self.text_in.weight
        position = torch.arange(size.text + size.image, device=like.device, dtype=torch.float32)[:, None]
        half = size.hidden // size.heads // 2
        angle = position * 10000.0 ** -(torch.arange(half, device=like.device, dtype=torch.float32) / half)
        self.cos, self.sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def block_bytes(self) -> int:
        blocks = (self.double_blocks, self.single_blocks)
        return sum(t.nbytes for b in blocks for t in (*b.parameters(), *b.buffers()))

    def attention(self, q, k, v):
        out = scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return out.transpose(1, 2).flatten(2)

    def turned(self, x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), -1).flatten(
            -2
        )

    def forward(self, image, text, vector):
        """image (batch, tokens, channels), text (batch, tokens, context), vector (batch, 1, hidden) ->
        (batch, image tokens, channels)."""
        vector = silu(vector)
        x = {"text": self.text_in(text), "image": self.image_in(image)}
        for pair in self.double_blocks:
            mods = {name: pair[name].mod(vector).chunk(6, -1) for name in x}
            parts = []
            for name in x:
                shift, scale = mods[name][:2]
                parts.append(pair[name].heads(pair[name].qkv(modulated(x[name], scale, shift))))
            attended = self.attention(*(torch.cat(t, 2) for t in zip(*parts, strict=True)))
            for name, part in zip(x, attended.split([self.size.text, self.size.image], 1), strict=True):
                block, (_, _, gate, shift, scale, mlp_gate) = pair[name], mods[name]
                y = torch.addcmul(x[name], gate, block.proj(part))
                inner = block.mlp0(modulated(y, scale, shift))
                x[name] = torch.addcmul(y, mlp_gate, block.mlp2(inner, Gelu()))
        x = torch.cat((x["text"], x["image"]), 1)
        for block in self.single_blocks:
            shift, scale, gate = block.mod(vector).chunk(3, -1)
            qkv, inner = block.linear1(modulated(x, scale, shift)).split(
                [3 * self.size.hidden, 4 * self.size.hidden], -1
            )
            attended = self.attention(*block.heads(qkv))
            x = torch.addcmul(
                x, gate, block.linear2(torch.cat((attended, gelu(inner, approximate="tanh")), -1))
            )
        shift, scale = self.last_mod(vector).chunk(2, -1)
        return self.last(modulated(x[:, self.size.text :], scale, shift))


def build(
    size: Size,
    dtype,
    device,
    grain: str | None,
    lora: int = 0,
    target: Target | None = None,
    seed: int = 0,
) -> Flux:
    """grain None: all in `dtype`, in which ComfyUI merges a LoRA. target: whose form layers are held in; that
    of the device if not given."""
    g, target = torch.Generator(device=device).manual_seed(seed), target or target_of(device)
    plain = lambda n, k, kind="": FloatLinear(
        n,
        k,
        kind,
        dtype,
        device,
        g,
    )
    ours = lambda n, k, kind: NibbleLinear(
        layer_spec(
            n,
            k,
            kind,
            str(grain),
            lora,
        ),
        dtype,
        device,
        g,
        target,
    )
    return Flux(
        size,
        plain if grain is None else ours,
        plain,
        dtype,
        device,
    )


def inputs(size: Size, dtype, device, seed: int = 1) -> tuple:
    g = torch.Generator(device=device).manual_seed(seed)
    shapes = ((size.image, size.channels), (size.text, size.context), (1, size.hidden))
    return tuple(torch.randn(size.batch, *shape, dtype=dtype, device=device, generator=g) for shape in shapes)


@torch.no_grad()
def step(
    model: Flux,
    size: Size,
    dtype,
    device,
    repeats: int = 5,
    seconds: float = 12.0,
) -> dict:
    """Milliseconds of a step, peak memory of steps in bytes, bytes of the blocks' weights.

    The time is the median of at most `repeats` steps, of fewer once `seconds` have passed, of one at least.

    On a GPU the peak is that of PyTorch's memory; on a CPU the most that the process has ever held, as Linux
    says, and 0 elsewhere.
    """
    on_gpu = torch.device(device).type == "cuda"
    wait = (lambda: torch.cuda.synchronize(device)) if on_gpu else (lambda: None)
    model.resize(size)
    given = inputs(size, dtype, device)
    finite = bool(torch.isfinite(model(*given)).all())
    if on_gpu:
        model(*given)
        wait()
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    begun = time.perf_counter()
    while not times or (len(times) < repeats and time.perf_counter() - begun < seconds):
        started = time.perf_counter()
        model(*given)
        wait()
        times.append(1000 * (time.perf_counter() - started))
    out = {"ms": median(times), "min_ms": min(times), "finite": finite, "repeats": len(times)}
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else resident_peak()
    return out | {"peak_bytes": peak, "block_bytes": model.block_bytes()}


def resident_peak() -> int:
    """The most resident memory that this process has had, in bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def free():
    """Gives back what a model had that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def paths(model: Flux, target: Target) -> dict[str, int]:
    """How many layers of the blocks take which path; {} in 16 bit."""
    specs = [layer.spec for layer in model.modules() if isinstance(layer, NibbleLinear)]
    return dict(Counter(f"{choose(spec, target).path} ({spec.precision})" for spec in specs))
