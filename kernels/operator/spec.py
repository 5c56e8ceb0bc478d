"""What a quantized linear layer is: a frozen description, apart from its tensors and from the paper it came
from."""

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from .compiling import constant_when_compiled
from .errors import NamedError
from .packing import PACKABLE_BITS
from .quantizers import GROUP

TENSOR_NAMES = (
    "weight",
    "weight_scale",
    "smooth_factor",
    "proj_down",
    "proj_up",
    "bias",
    "transform",
    "channel_order",
)
LARGEST_ROTATION = 4096  # its matrix has 64 MiB; methods take 256
GELU_SHIFT = 0.171875  # above -min(GELU) = 0.17; nunchaku's and comfy-kitchen's constant


class SpecError(NamedError):
    """A layer description that contradicts itself or does not fit its tensors."""


def _check(ok, message):
    if not ok:
        raise SpecError(message)


@dataclass(frozen=True)
class ActivationSpec:
    """Dynamic quantization of Tx. granularity: "token", "group" (64 channels of one token) or "tensor".

    The scale is clip * absmax / largest code; what lies beyond is clamped. bits: 1 (signs: -1 and 1, never
    unsigned), 2, 3, 4 or 8.
    """

    bits: int = 4
    granularity: str = "group"
    group: int = GROUP
    unsigned: bool = False
    shift: float = 0.0
    clip: float = 1.0

    def __post_init__(self):
        _check(0 < self.clip <= 1, f"clip must be above 0 and at most 1, found {self.clip}")
        _check(self.bits in (1, 2, 3, 4, 8), f"activation bits must be 1, 2, 3, 4 or 8, found {self.bits}")
        _check(
            self.bits > 1 or not self.unsigned,
            "1-bit activation codes are -1 and 1, they cannot be unsigned: take 2 bits, or signed",
        )
        _check(
            self.granularity in ("token", "group", "tensor"),
            f"unknown activation granularity {self.granularity!r}",
        )
        wide = self.unsigned or self.bits == 8  # 8 bits have room for a shifted range with a sign
        _check(self.shift == 0 or wide, "a shift goes with unsigned or 8-bit activation codes only")


@dataclass(frozen=True)
class WeightSpec:
    """Static quantization of W T^-1. granularity: "channel" (a row), "group" (64 in-channels of a row) or
    "tensor"."""

    bits: int = 4
    granularity: str = "group"
    group: int = GROUP

    def __post_init__(self):
        _check(self.bits in PACKABLE_BITS, f"weight bits must be 2, 4 or 8, found {self.bits}")
        _check(
            self.granularity in ("channel", "group", "tensor"),
            f"unknown weight granularity {self.granularity!r}",
        )


@dataclass(frozen=True)
class PartSpec:
    """One range of in-channels with its own transform, quantizers and low-rank branch.

    activation None: weight-only, x stays in 16 bit. rotation: Hadamard block size, 0 for none. kronecker:
    (p1, p2) of a learned transform of slices of p1 p2 channels, () for none; one pair of factors for all
    slices, or with `per_slice` one for each.
    """

    start: int
    stop: int
    weight: WeightSpec = field(default_factory=WeightSpec)
    activation: ActivationSpec | None = field(default_factory=ActivationSpec)
    smooth: bool = False
    rotation: int = 0
    rank: int = 0
    kronecker: tuple[int, ...] = ()
    per_slice: bool = False

    def __post_init__(self):
        _check(0 <= self.start < self.stop, f"empty range of in-channels {self.start}..{self.stop}")
        _check(self.rank >= 0 and self.rotation >= 0, "rank and rotation cannot be negative")
        if self.rotation:
            power = self.rotation & (self.rotation - 1) == 0 and 2 <= self.rotation <= LARGEST_ROTATION
            _check(
                power, f"a rotation takes a power of two from 2 to {LARGEST_ROTATION}, found {self.rotation}"
            )
            _check(
                self.width % self.rotation == 0,
                f"rotation {self.rotation} does not divide {self.width} channels",
            )
        for q in (self.weight, self.activation):
            if q is not None and q.granularity == "group":
                _check(
                    q.group > 0 and self.width % q.group == 0,
                    f"group {q.group} does not divide {self.width} channels",
                )
        shifted = self.activation is not None and self.activation.shift != 0
        _check(
            not (shifted and (self.rotation or self.kronecker)),
            "a shift cannot be combined with a rotation or a learned transform",
        )
        if self.kronecker:
            _check(
                len(self.kronecker) == 2 and min(self.kronecker) > 0,
                f"kronecker must be two sizes, found {self.kronecker}",
            )
            size = self.kronecker[0] * self.kronecker[1]
            _check(self.width % size == 0, f"slices of {size} channels do not divide {self.width}")
            _check(not self.rotation, "a rotation and a learned transform exclude each other")
        else:
            _check(not self.per_slice, "per_slice goes with a learned transform only")

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def pairs(self) -> int:
        """Pairs of factors of the learned transform."""
        return (
            (self.width // (self.kronecker[0] * self.kronecker[1]) if self.per_slice else 1)
            if self.kronecker
            else 0
        )

    @property
    def factor_values(self) -> int:
        """Values of the factors of its learned transform, pair by pair."""
        return self.pairs * sum(k * k for k in self.kronecker)

    @property
    def bytes_per_row(self) -> int:
        return self.width * self.weight.bits // 8

    @property
    def scale_rows(self) -> int:
        return self.width // self.weight.group if self.weight.granularity == "group" else 1


@dataclass(frozen=True)
class LinearSpec:
    """A quantized linear layer (architecture: the one operator).

    Tensors, N = out_features, K = in_features + padding, G = sum of `scale_rows`, R = the rank, P = number of
    parts:

    ============== ===================== ==========================================================
    weight         int8 (N, bytes)       packed codes, the parts side by side
    weight_scale   16 or 32 bit (G, N)   the parts below each other
    smooth_factor  16 bit (K,)           x is divided by it; absent where no part smooths
    proj_down      16 bit (K, R)         on the raw x, padded, each part's rows to its own R columns
    proj_up        16 bit (N, P R)       absent, as proj_down, at rank 0
    bias           16 or 32 bit (N,)     with the correction of shifted activations in it
    transform      16 or 32 bit          Kronecker factors, part by part and pair by pair p1 p1, then
                                         p2 p2 values; absent without a learned transform
    channel_order  int32 (K,)            a permutation: in-channel i of the parts is channel
                                         channel_order[i] of the raw x; absent without `order`. All
                                         tensors above hold in-channels in this order.
    ============== ===================== ==========================================================

    padding: zeros that `quant_linear` puts behind the in_features channels of x, so that the last part ends
    with a whole group of 64; the parts are over both. spatial: dimensions that x has behind its channels in
    the model, which holds the layer as a 1x1 convolution: 1 or 2, or 0 for a linear layer. `quant_linear`
    takes the channels last whatever it says. text: the spec as a string, see `parse`; the one value of it
    that torch.compile guards on and hands to operators. weight_shapes: ((name, shape), ...) of the first two
    tensors.
    """

    in_features: int
    out_features: int
    parts: tuple[PartSpec, ...]
    bias: bool = True
    order: bool = False
    padding: int = 0
    spatial: int = 0

    if TYPE_CHECKING:  # set below: no fields, they say nothing more than the fields do

        @property
        def text(self) -> str: ...

        @property
        def weight_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]: ...

    def __post_init__(self):
        _check(self.padding >= 0, f"padding cannot be negative, found {self.padding}")
        _check(
            0 <= self.spatial <= 2,
            f"convolutions have 1 or 2 dimensions behind the channels, found {self.spatial}",
        )
        _check(self.parts and self.out_features > 0, "a layer needs at least one part and one out-channel")
        edge = 0
        for part in self.parts:
            whole = part.width * part.weight.bits % 8 == 0
            _check(whole, f"{part.width} channels of {part.weight.bits} bits do not fill whole bytes")
            _check(
                part.start == edge,
                f"parts must follow each other: expected a part at channel {edge}, found {part.start}",
            )
            edge = part.stop
        padded = f" and {self.padding} of padding" * bool(self.padding)
        _check(edge == self.width, f"parts end at channel {edge}, the layer has {self.in_features}{padded}")
        _check(len({p.rank for p in self.parts}) == 1, "all parts of a layer share one rank")
        object.__setattr__(self, "text", _text(_values(self)))
        rows, columns = sum(p.scale_rows for p in self.parts), sum(p.bytes_per_row for p in self.parts)
        shapes = (("weight", (self.out_features, columns)), ("weight_scale", (rows, self.out_features)))
        object.__setattr__(self, "weight_shapes", shapes)

    @property
    def width(self) -> int:
        """In-channels of the parts, padding included."""
        return self.in_features + self.padding

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Of the model's own weight."""
        return (self.out_features, self.in_features) + (1,) * self.spatial

    @property
    def rank(self) -> int:
        return self.parts[0].rank

    @property
    def weight_only(self) -> bool:
        return all(p.activation is None for p in self.parts)

    def split(self, tensors: dict):
        """Yields (part, packed codes (N, bytes), scales (G, N), smoothing (w,) or None) of each part, views
        of `tensors`."""
        column = row = 0
        for part in self.parts:
            codes = tensors["weight"][:, column : column + part.bytes_per_row]
            scales = tensors["weight_scale"][row : row + part.scale_rows]
            yield (
                part,
                codes,
                scales,
                tensors["smooth_factor"][part.start : part.stop] if part.smooth else None,
            )
            column, row = column + part.bytes_per_row, row + part.scale_rows

    def factors(self, tensors: dict):
        """Yields of each part the factors of its learned transform, (pairs, p1, p1) and (pairs, p2, p2), or
        None."""
        at = 0
        for part in self.parts:
            if not part.kronecker:
                yield None
                continue
            p1, p2 = part.kronecker
            pairs = tensors["transform"][at : at + part.factor_values].view(part.pairs, -1)
            yield pairs[:, : p1 * p1].reshape(-1, p1, p1), pairs[:, p1 * p1 :].reshape(-1, p2, p2)
            at += part.factor_values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors this layer must have, and their shapes."""
        n, out = self.out_features, dict(self.weight_shapes)
        if any(p.smooth for p in self.parts):
            out["smooth_factor"] = (self.width,)
        if self.rank:
            out["proj_down"] = (self.width, self.rank)
            out["proj_up"] = (n, self.rank * len(self.parts))
        if self.bias:
            out["bias"] = (n,)
        if size := sum(p.factor_values for p in self.parts):
            out["transform"] = (size,)
        if self.order:
            out["channel_order"] = (self.width,)
        return out

    def without_learned(self) -> "LinearSpec":
        """What is left when x comes smoothed and transformed where there is a learned transform, and the low
        rank is added elsewhere."""
        plain = lambda p: replace(
            p, rank=0, smooth=p.smooth and not p.kronecker, kronecker=(), per_slice=False
        )
        return replace(self, parts=tuple(map(plain, self.parts)))

    def without_order(self) -> "LinearSpec":
        """What is left when x comes in the order of the parts."""
        return replace(self, order=False)

    def without_padding(self) -> "LinearSpec":
        """What is left when x comes padded."""
        return replace(self, in_features=self.width, padding=0)

    def as_int8(self) -> "LinearSpec":
        """The layer with 8-bit weights, one scale a row; itself where it has them.

        Parts whose scales are those of rows and tokens keep their activations: only the codes are stored in
        more bits. Those with groups are W8A8 with one scale a token, weight-only ones W8A16. Transforms,
        shift and low rank stay.
        """

        def eight(p):
            if p.activation is None or "group" not in (p.weight.granularity, p.activation.granularity):
                return replace(p, weight=WeightSpec(8, "channel"))
            activation = ActivationSpec(8, "token", shift=p.activation.shift)
            return replace(p, weight=WeightSpec(8, "channel"), activation=activation)

        parts = tuple(map(eight, self.parts))
        return self if parts == self.parts else replace(self, parts=parts)

    @property
    def precision(self) -> str:
        """E.g. "W4A8", of the widest part."""
        return self.describe().split()[0]

    def describe(self) -> str:
        """One short phrase for reports, e.g. "W4A4 g64 smooth r32". Of the widest part, and what is in more
        bits beside it."""
        part = max(self.parts, key=lambda p: (p.width, -p.weight.bits, p.start))
        act = "16" if part.activation is None else str(part.activation.bits)
        grain = "g64" if part.weight.granularity == "group" else f"per {part.weight.granularity}"
        words = [f"W{part.weight.bits}A{act}", grain]
        words += ["smooth"] * any(p.smooth for p in self.parts)
        words += [f"H{max(p.rotation for p in self.parts)}"] * any(p.rotation for p in self.parts)
        learned = next((p for p in self.parts if p.kronecker), None)
        if learned is not None:
            sizes, run = (
                learned.kronecker,
                sum((p.width, p.kronecker) == (learned.width, learned.kronecker) for p in self.parts),
            )
            words[1] += " and slice" * (run > 1 and grain != "g64")
            words.append(f"{run * learned.width // (sizes[0] * sizes[1])} slices {'x'.join(map(str, sizes))}")
        words += ["unsigned"] * any(p.activation is not None and p.activation.unsigned for p in self.parts)
        words += [f"r{self.rank}"] * bool(self.rank)
        more = sum(p.width for p in self.parts if p.weight.bits > part.weight.bits)
        words += [f"{more} channels at 8 bit"] * bool(more)
        words += [f"padded to {self.width} channels"] * bool(self.padding)
        words += ["1x1 convolution"] * bool(self.spatial)
        return " ".join(words)


def _values(spec):
    """A spec as nested tuples of its fields' values, by steps that torch.compile follows where a spec is made
    under it."""
    if isinstance(spec, tuple):
        return tuple(_values(part) for part in spec)
    names = getattr(spec, "__match_args__", None)
    return spec if names is None else tuple(_values(getattr(spec, name)) for name in names)


@constant_when_compiled
def _text(values) -> str:
    return json.dumps(values)


@lru_cache(maxsize=4096)
def parse(text: str) -> LinearSpec:
    """The LinearSpec of a `LinearSpec.text`."""
    in_features, out_features, parts, bias, order, padding, spatial = json.loads(text)
    part = lambda start, stop, weight, act, smooth, rotation, rank, kronecker, per_slice: PartSpec(
        start,
        stop,
        WeightSpec(*weight),
        ActivationSpec(*act) if act else None,
        smooth,
        rotation,
        rank,
        tuple(kronecker),
        per_slice,
    )
    return LinearSpec(
        in_features, out_features, tuple(part(*values) for values in parts), bias, order, padding, spatial
    )
