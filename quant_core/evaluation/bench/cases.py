"""What is measured: the layer shapes of four models, and the calls of this pack that are timed on each."""

import zlib
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ....kernels.cards import MMA
from ....kernels.operator.codes import INT, NVFP4, four_bits
from ....kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from ....kernels.target import Target
from ...methods.factors import balanced

RANK = LORA_RANK = 32
# (out-channels, in-channels)
LAYERS = {
    "FLUX": ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)),
    "PixArt": ((1152, 1152), (4608, 1152), (1152, 4608)),
    "Wan 1.3B": ((1536, 1536), (8960, 1536), (1536, 8960)),
    "Wan 14B": ((5120, 5120), (13824, 5120), (5120, 13824)),
}
FLUX_TOKENS = 4096 + 512  # 1024 x 1024 pixels and the text
TOKENS = (FLUX_TOKENS, 1024, 256, 16384)  # what the targets are stated for comes first, the longest last


@dataclass(frozen=True)
class Case:
    """One layer on m tokens: n out-channels, k in-channels."""

    model: str
    n: int
    k: int
    m: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.n} x {self.k}, M {self.m}"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def least_bytes(self) -> int:
        """16-bit x once in, 16-bit y once out, 4-bit weights once."""
        return 2 * self.m * self.k + 2 * self.m * self.n + self.n * self.k // 2

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


FULL = tuple(Case(model, n, k, m) for m in TOKENS for model, shapes in LAYERS.items() for n, k in shapes)
QUICK = (
    *(Case("FLUX", n, k, FLUX_TOKENS) for n, k in ((3072, 3072), (12288, 3072), (3072, 12288))),
    Case("PixArt", 1152, 1152, 256),
)
# On Triton's interpreter: a few tiles in each direction, with rests.
TINY = (Case("tiny", 80, 256, 35), Case("tiny", 48, 512, 3))


@dataclass(frozen=True)
class Column:
    """One of our calls. kind: "operator" (all of quant_linear), "gemm" (the product alone, codes prepared) or
    "quantize".

    grain: "channel" (weights a channel, activations a token), "group" (64), or "W8A8": what group-64 layers
    become on Hopper. int8: not with the native INT4 kernels. learned: smoothed and transformed as SplitQuant
    does it, four slices sharing the transform.
    """

    name: str
    kind: str
    grain: str
    slices: int = 1
    rank: int = 0
    int8: bool = False
    learned: bool = False

    def spec(self, n: int, k: int) -> LinearSpec:
        """SVDQuant's layer where there is a rank, else a plain product. What is quantized alone is always
        smoothed."""
        weight, act = quantizers(self.grain)
        smooth, kronecker = self.rank > 0 or self.kind == "quantize", balanced(k // 4) if self.learned else ()
        part = lambda a, b: PartSpec(a, b, weight, act, smooth=smooth, rank=self.rank, kronecker=kronecker)
        parts = (part(a, b) for a, b in pairwise(slice_edges(k, self.slices)))
        return LinearSpec(k, n, tuple(parts), bias=self.rank > 0)

    def target(self, device: Target) -> Target:
        """The Target to plan for. sm_120 has the int8 path of the older cards and no native INT4."""
        return replace(device, arch=120) if self.int8 else device


def quantizers(grain: str) -> tuple[WeightSpec, ActivationSpec]:
    """The two sides of a grain of `Column`."""
    if grain in ("group", NVFP4):
        return four_bits(INT if grain == "group" else NVFP4)
    bits = 8 if grain == "W8A8" else 4
    return WeightSpec(bits, "channel"), ActivationSpec(bits, "token")


def primary_grain(target: Target) -> str:
    """Hopper's wgmma wants long sums: one scale a channel. Elsewhere the 64-channel groups that files have by
    default."""
    return "channel" if target.backend == "cuda" and target.arch == 90 else "group"


def other_grain(target: Target) -> str:
    return "W8A8" if primary_grain(target) == "channel" else "channel"


def columns(target: Target) -> tuple[Column, ...]:
    """Our columns on a card; those of a native INT4 card once more on its int8 path."""
    first, other = primary_grain(target), other_grain(target)
    found: tuple[Column, ...] = (
        Column("qgemm", "gemm", "channel"),
        Column("operator", "operator", first, rank=RANK),
        # A LoRA is more columns of the low-rank branch: this is the operator with one of rank 32 beside
        # SVDQuant's 32.
        Column("operator + LoRA", "operator", first, rank=RANK + LORA_RANK),
        Column(f"operator {other}", "operator", other, rank=RANK),
        Column("split4", "gemm", "channel", slices=4),
        Column("quantize", "quantize", first, rank=RANK),
        Column("quantize token", "quantize", "channel"),
        Column("quantize transform", "quantize", "channel", learned=True),
    )
    if target.card.int4 == MMA:
        found += tuple(replace(c, name=f"{c.name} int8", int8=True) for c in found)
    return found


def slice_edges(k: int, slices: int) -> tuple[int, ...]:
    """Edges of slices of nearly equal width, multiples of 128 channels where k is long enough, else of 64."""
    unit = 128 if k % 128 == 0 and k >= 128 * slices else 64
    return (*(k // unit * i // slices * unit for i in range(slices)), k)


def random_tensors(spec: LinearSpec, dtype, device, generator) -> dict[str, torch.Tensor]:
    """Tensors of a layer with random codes over the whole range and an output near 1 for a standard normal
    input."""
    out = {}
    code_rms = 2 ** spec.parts[0].weight.bits / 12**0.5  # of codes drawn from the whole range
    for name, shape in spec.shapes().items():
        if name == "weight":
            out[name] = torch.randint(-128, 128, shape, dtype=torch.int8, device=device, generator=generator)
            continue
        make = torch.rand if name in ("weight_scale", "smooth_factor") else torch.randn
        value = make(shape, dtype=torch.float32, device=device, generator=generator)
        if name == "weight_scale":
            value = (value + 0.5) / (code_rms * spec.in_features**0.5)
        elif name == "smooth_factor":
            value += 0.5
        elif name == "proj_down":
            value /= spec.in_features**0.5
        else:
            value *= 0.1
        out[name] = value.to(dtype)
    return out


def random_input(m: int, k: int, dtype, device, generator) -> torch.Tensor:
    return torch.randn(m, k, dtype=dtype, device=device, generator=generator)


def generator(seed: int, device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)
