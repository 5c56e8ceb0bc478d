"""From a LinearSpec to launches: which parts share a kernel, and how their codes lie in memory."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from math import gcd

from .cards import M8N8K32
from .operator.codes import NVFP4
from .operator.spec import ActivationSpec, LinearSpec, PartSpec
from .target import Target

CHANNEL, SLICE, GROUP = 0, 1, 2
FP4 = "gemm_fp4"
MAX_SLICES = 8


@dataclass(frozen=True)
class QuantizeRun:
    """`count` neighbouring parts with the settings of `part`, the first of them, quantized in one launch."""

    part: PartSpec
    count: int


@dataclass(frozen=True)
class Gemm:
    """One launch of a matrix-product kernel over in-channels start..stop.

    planes: codes a byte of the weights, laid out in as many planes of x; 0 where x is packed like the weights
    (native INT4). scales: CHANNEL, SLICE (one a part) or GROUP (one each 64 channels). row, column: where its
    scales and bytes start.
    """

    kernel: str
    planes: int
    scales: int
    swap: bool
    parts: tuple[PartSpec, ...]
    row: int
    column: int
    runs: tuple[QuantizeRun, ...]

    @cached_property
    def start(self) -> int:
        return self.parts[0].start

    @cached_property
    def width(self) -> int:
        return self.parts[-1].stop - self.parts[0].start

    @cached_property
    def row_bytes(self) -> int:
        return sum(p.bytes_per_row for p in self.parts)

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of x's codes a token."""
        return self.width if self.planes else self.width // 2

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where the slices end, in bytes of a weight row."""
        return tuple(accumulate(p.bytes_per_row for p in self.parts))

    @cached_property
    def block(self) -> int:
        """Bytes of a weight row that a step of the main loop must divide: one group, or what all slices are
        multiples of. 0: any."""
        per_byte = 8 // self.parts[0].weight.bits
        return {CHANNEL: 0, SLICE: gcd(*(p.bytes_per_row for p in self.parts)), GROUP: 64 // per_byte}[
            self.scales
        ]

    @cached_property
    def act_segments(self) -> int:
        return sum(p.width // 64 if _activation(p).granularity == "group" else 1 for p in self.parts)

    @cached_property
    def act_grouped(self) -> bool:
        return _activation(self.parts[0]).granularity == "group"

    @cached_property
    def weight_segments(self) -> int:
        return sum(p.scale_rows for p in self.parts)


def _activation(part: PartSpec) -> ActivationSpec:
    """Of a part that a launch of the quantizer takes, which weight-only parts are not."""
    assert part.activation is not None
    return part.activation


def has_groups(part: PartSpec) -> bool:
    """Whether a scale changes every 64 channels."""
    return part.weight.granularity == "group" or _activation(part).granularity == "group"


def kernel_of(part: PartSpec, target: Target) -> tuple[str, int]:
    """(kernel, planes) of a part on a target."""
    if part.grid == NVFP4:
        return FP4, 0
    if target.card.int4 and part.weight.bits == 4 and _activation(part).bits <= 4:
        kind = "u4s4" if _activation(part).unsigned else "s4s4"
        return f"{'turing' if target.card.int4 == M8N8K32 else 'gemm'}_{kind}", 0
    return "gemm_int8", 8 // part.weight.bits


@lru_cache(maxsize=256)
def lower(spec: LinearSpec, target: Target) -> tuple[Gemm, ...]:
    """The launches of a layer whose parts all have quantized activations."""
    swap = target.card.wgmma
    described, row, column = [], 0, 0
    for part in spec.parts:
        # Parts with only one of the two scales grouped have a stride of their own and stay alone.
        mixed = has_groups(part) and not (part.weight.granularity == _activation(part).granularity == "group")
        # On nvfp4 each part has scales of its rows and tokens of its own.
        alone = mixed or part.grid == NVFP4
        key = (kernel_of(part, target), part.weight.bits, has_groups(part), part.start if alone else None)
        described.append((key, part, row, column))
        row, column = row + part.scale_rows, column + part.bytes_per_row
    out = []
    for ((kernel, planes), _, by_group, _), alike_items in groupby(described, key=lambda d: d[0]):
        items = list(alike_items)
        for some in [items] if by_group else batched(items, MAX_SLICES):
            parts = tuple(d[1] for d in some)
            scales = GROUP if by_group else (CHANNEL if len(parts) == 1 else SLICE)
            # Packed weights are the register operand of a wgmma; 8-bit weights need no unpacking.
            out.append(
                Gemm(kernel, planes, scales, swap and planes > 1, parts, some[0][2], some[0][3], _runs(parts))
            )
    return tuple(out)


def batched(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def alike(part: PartSpec) -> tuple:
    """What parts that one launch quantizes have in common."""
    return (
        *(part.width, part.activation, part.smooth, part.rotation, part.kronecker, part.per_slice),
        part.principal,
    )


def _runs(parts) -> tuple[QuantizeRun, ...]:
    runs = [list(items) for _, items in groupby(parts, key=alike)]
    return tuple(QuantizeRun(items[0], len(items)) for items in runs)
