"""One denoising step of a transformer of FLUX.1's shape, in 16 bit and on the pack's operator: the same code,
other linears.

Only time and memory are of interest, so weights are random, positions count along one axis, and the vector of
time and pooled text is given. Attention is torch's; the embedders and the last layer stay in 16 bit, as the
pack leaves them.
"""

import gc
import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import gelu, linear, rms_norm, scaled_dot_product_attention, silu

from ....kernels.dispatch import quant_linear
from ....kernels.operator.spec import GELU_SHIFT, LinearSpec, PartSpec
from ....kernels.prologue import Gelu, LayerNormModulate
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
    """FLUX.1 dev at 1024 x 1024."""

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

    def __init__(self, n, k, kind, dtype, device, generator):
        super().__init__()
        make = lambda *shape: nn.Parameter(
            torch.randn(*shape, dtype=dtype, device=device, generator=generator) / k**0.5, False
        )
        self.weight, self.bias = make(n, k), make(n)

    def forward(self, x, prologue=None):
        return linear(x if prologue is None else prologue(x), self.weight, self.bias)


class NibbleLinear(nn.Module):
    """The same shape on the pack's operator, with random codes that are made on the device. grain: "channel"
    or "group"."""

    def __init__(self, n, k, kind, dtype, device, generator, grain):
        super().__init__()
        self.spec = layer_spec(n, k, kind, grain)
        for name, tensor in random_tensors(self.spec, dtype, device, generator).items():
            self.register_buffer(name, tensor)

    def forward(self, x, prologue=None):
        return quant_linear(x, self.spec, dict(self.named_buffers()), prologue=prologue)


def layer_spec(n: int, k: int, kind: str, grain: str) -> LinearSpec:
    """SVDQuant's description of a layer of the model; modulation is weight-only."""
    if kind == "vector":
        return LinearSpec(k, n, (PartSpec(0, k, activation=None),))
    weight, plain = quantizers(grain)
    after_gelu = replace(plain, unsigned=plain.bits < 8, shift=GELU_SHIFT)
    edges = {
        "": ((0, k, plain),),
        "gelu": ((0, k, after_gelu),),
        "attn|gelu": ((0, k // 5, plain), (k // 5, k, after_gelu)),
    }[kind]
    return LinearSpec(k, n, tuple(PartSpec(a, b, weight, act, smooth=True, rank=RANK) for a, b, act in edges))


class Block(nn.Module):
    """The linears of a list, by name, and the scales of the query and key norms."""

    def __init__(self, layers, size, make, dtype, device):
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
        """(tokens, 3 hidden) -> normed q and k, v, each (heads, tokens, channels of a head)."""
        width = self.query.shape[0]
        q, k, v = qkv.unflatten(-1, (3, -1, width)).permute(1, 2, 0, 3)
        return rms_norm(q, (width,), self.query, 1e-6), rms_norm(k, (width,), self.key, 1e-6), v


class Flux(nn.Module):
    """make(n, k, kind) builds the blocks' linears, edge(n, k) those that stay in 16 bit."""

    def __init__(self, size: Size, make, edge, dtype, device):
        super().__init__()
        h = size.hidden
        self.size = size
        self.image_in, self.text_in = edge(h, size.channels), edge(h, size.context)
        block = lambda layers: Block(layers, size, make, dtype, device)
        self.double_blocks = nn.ModuleList(
            nn.ModuleDict({"text": block(STREAM), "image": block(STREAM)}) for _ in range(size.double)
        )
        self.single_blocks = nn.ModuleList(block(SINGLE) for _ in range(size.single))
        self.last_mod, self.last = edge(2 * h, h), edge(size.channels, h)
        position = torch.arange(size.text + size.image, device=device, dtype=torch.float32)[:, None]
        half = h // size.heads // 2
        angle = position * 10000.0 ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        self.register_buffer("cos", angle.cos().to(dtype))
        self.register_buffer("sin", angle.sin().to(dtype))

    def block_bytes(self) -> int:
        blocks = (self.double_blocks, self.single_blocks)
        return sum(t.nbytes for b in blocks for t in (*b.parameters(), *b.buffers()))

    def attention(self, q, k, v):
        out = scaled_dot_product_attention(self.turned(q)[None], self.turned(k)[None], v[None])
        return out[0].transpose(0, 1).flatten(1)

    def turned(self, x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), -1).flatten(
            -2
        )

    def forward(self, image, text, vector):
        """image (tokens, channels), text (tokens, context), vector (1, hidden) -> (image tokens,
        channels)."""
        vector = silu(vector)
        x = {"text": self.text_in(text), "image": self.image_in(image)}
        for pair in self.double_blocks:
            mods = {name: pair[name].mod(vector).chunk(6, -1) for name in x}
            parts = []
            for name in x:
                shift, scale = mods[name][:2]
                parts.append(pair[name].heads(pair[name].qkv(x[name], LayerNormModulate(scale, shift))))
            attended = self.attention(*(torch.cat(t, 1) for t in zip(*parts, strict=True)))
            for name, part in zip(x, attended.split([self.size.text, self.size.image]), strict=True):
                block, (_, _, gate, shift, scale, mlp_gate) = pair[name], mods[name]
                y = torch.addcmul(x[name], gate, block.proj(part))
                inner = block.mlp0(y, LayerNormModulate(scale, shift))
                x[name] = torch.addcmul(y, mlp_gate, block.mlp2(inner, Gelu()))
        x = torch.cat((x["text"], x["image"]))
        for block in self.single_blocks:
            shift, scale, gate = block.mod(vector).chunk(3, -1)
            qkv, inner = block.linear1(x, LayerNormModulate(scale, shift)).split(
                [3 * self.size.hidden, 4 * self.size.hidden], -1
            )
            attended = self.attention(*block.heads(qkv))
            x = torch.addcmul(
                x, gate, block.linear2(torch.cat((attended, gelu(inner, approximate="tanh")), -1))
            )
        shift, scale = self.last_mod(vector).chunk(2, -1)
        return self.last(x[self.size.text :], LayerNormModulate(scale, shift))


def build(size: Size, dtype, device, grain: str | None, seed: int = 0) -> Flux:
    """grain None: all in `dtype`."""
    g = torch.Generator(device=device).manual_seed(seed)
    plain = lambda n, k, kind="": FloatLinear(n, k, kind, dtype, device, g)
    make = plain if grain is None else lambda n, k, kind: NibbleLinear(n, k, kind, dtype, device, g, grain)
    return Flux(size, make, plain, dtype, device)


def inputs(size: Size, dtype, device, seed: int = 1) -> tuple:
    g = torch.Generator(device=device).manual_seed(seed)
    shapes = ((size.image, size.channels), (size.text, size.context), (1, size.hidden))
    return tuple(torch.randn(*shape, dtype=dtype, device=device, generator=g) for shape in shapes)


@torch.no_grad()
def step(size: Size, dtype, device, grain: str | None, repeats: int = 5) -> dict:
    """Milliseconds of a step (median of `repeats`), peak memory of steps in bytes (0 without a GPU), bytes of
    the blocks' weights. One model is held."""
    on_gpu = torch.device(device).type == "cuda"
    wait = (lambda: torch.cuda.synchronize(device)) if on_gpu else (lambda: None)
    _free()
    started = time.perf_counter()
    model, given = build(size, dtype, device, grain), inputs(size, dtype, device)
    finite = bool(torch.isfinite(model(*given)).all())
    model(*given)
    wait()
    ready = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        model(*given)
        wait()
        times.append(1000 * (time.perf_counter() - started))
    out = {"ms": median(times), "min_ms": min(times), "finite": finite, "ready_s": ready, "repeats": repeats}
    out |= {
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else 0,
        "block_bytes": model.block_bytes(),
    }
    del model, given
    _free()
    return out


def _free():
    gc.collect()
    torch.cuda.empty_cache()
