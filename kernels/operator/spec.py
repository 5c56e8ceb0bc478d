"""What a quantized linear layer is: a frozen description, apart from its tensors and from the paper it came
from."""

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from . import nvfp4
from .codes import GELU_SHIFT as GELU_SHIFT
from .codes import NVFP4, ActivationSpec, WeightSpec
from .codes import SpecError as SpecError
from .compiling import constant_when_compiled

TENSOR_NAMES = (
    "weight",
    "weight_scale",
    "smooth_factor",
    "proj_down",
    "proj_up",
    "bias",
    "transform",
    "channel_order",
    "outer_scale",
)
LARGEST_ROTATION = 4096  # its matrix has 64 MiB; methods take 256


@dataclass(frozen=True)
class PartSpec:
    """One range of in-channels with its own transform, quantizers and low-rank branch.

    activation None: weight-only, x stays in 16 bit. rotation: Hadamard block size, 0 for none. kronecker:
    (p1, p2) of a learned transform of slices of p1 p2 channels, () for none; one pair of factors for all
    slices, or with `per_slice` one for each. principal: of the low rank's columns, the first of each part,
    that take their share out of x before it is rounded (`transforms.carried`).
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
    principal: int = 0

    def __post_init__(self):
        if not (0 <= self.start < self.stop):
            raise SpecError(f"empty range of in-channels {self.start}..{self.stop}")
        if not (self.rank >= 0 and self.rotation >= 0):
            raise SpecError("rank and rotation cannot be negative")
        if self.rotation:
            power = self.rotation & (self.rotation - 1) == 0 and 2 <= self.rotation <= LARGEST_ROTATION
            if not power:
                raise SpecError(
                    f"a rotation takes a power of two from 2 to {LARGEST_ROTATION}, found {self.rotation}"
                )
            if self.width % self.rotation != 0:
                raise SpecError(f"rotation {self.rotation} does not divide {self.width} channels")
        for q in (self.weight, self.activation):
            grouped = q is not None and q.granularity == "group"
            if grouped and not (q.group > 0 and self.width % q.group == 0):
                raise SpecError(f"group {q.group} does not divide {self.width} channels")
        shifted = self.activation is not None and self.activation.shift != 0
        if shifted and (self.rotation or self.kronecker):
            raise SpecError("a shift cannot be combined with a rotation or a learned transform")
        if not (0 <= self.principal <= self.rank):
            raise SpecError(
                f"principal components are columns of the low rank: expected 0 to {self.rank}, found "
                f"{self.principal}"
            )
        if self.principal and (shifted or self.kronecker or self.activation is None):
            raise SpecError(
                "principal components go with quantized activations without a shift or a learned transform"
            )
        if self.grid == NVFP4 and self.kronecker:
            raise SpecError("a learned transform goes with integer codes only")
        if self.kronecker:
            if not (len(self.kronecker) == 2 and min(self.kronecker) > 0):
                raise SpecError(f"kronecker must be two sizes, found {self.kronecker}")
            size = self.kronecker[0] * self.kronecker[1]
            if self.width % size != 0:
                raise SpecError(f"slices of {size} channels do not divide {self.width}")
            if self.rotation:
                raise SpecError("a rotation and a learned transform exclude each other")
        elif self.per_slice:
            raise SpecError("per_slice goes with a learned transform only")

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def grid(self) -> str:
        """Of the weight's codes."""
        return self.weight.grid

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
    weight_scale   16 or 32 bit (G, N)   the parts below each other; on the nvfp4 grid e4m3 (N, G), the
                                         parts side by side, as tensor cores read it
    smooth_factor  16 bit (K,)           x is divided by it; absent where no part smooths
    proj_down      16 bit (K, R)         on the raw x, padded, each part's rows to its own R columns;
                                         the first `principal` of a part are diag(1/s) V, V orthonormal
    proj_up        16 bit (N, P R)       absent, as proj_down, at rank 0
    bias           16 or 32 bit (N,)     with the correction of shifted activations in it
    transform      16 or 32 bit          Kronecker factors, part by part and pair by pair p1 p1, then
                                         p2 p2 values; absent without a learned transform
    outer_scale    fp32 (P, N)           on the nvfp4 grid: what the scales of a part's row are multiplied by
    channel_order  int32 (K,)            a permutation: in-channel i of the parts is channel
                                         channel_order[i] of the raw x; absent without `order`. All
                                         tensors above hold in-channels in this order.
    ============== ===================== ==========================================================

    padding: zeros that `quant_linear` puts behind the in_features channels of x, so that the last part ends
    with a whole group of 64; the parts are over both. spatial: dimensions that x has behind its channels in
    the model, which holds the layer as a 1x1 convolution: 1 or 2, or 0 for a linear layer. `quant_linear`
    takes the channels last whatever it says. text: the spec as a string, for `text.parse`; the one value of
    it that torch.compile guards on and hands to operators. weight_shapes: ((name, shape), ...) of the first
    two tensors.
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
        if self.padding < 0:
            raise SpecError(f"padding cannot be negative, found {self.padding}")
        if not (0 <= self.spatial <= 2):
            raise SpecError(f"convolutions have 1 or 2 dimensions behind the channels, found {self.spatial}")
        if not (self.parts and self.out_features > 0):
            raise SpecError("a layer needs at least one part and one out-channel")
        edge = 0
        for part in self.parts:
            whole = part.width * part.weight.bits % 8 == 0
            if not whole:
                raise SpecError(f"{part.width} channels of {part.weight.bits} bits do not fill whole bytes")
            if part.start != edge:
                raise SpecError(
                    f"parts must follow each other: expected a part at channel {edge}, found {part.start}"
                )
            edge = part.stop
        padded = f" and {self.padding} of padding" * bool(self.padding)
        if edge != self.width:
            raise SpecError(f"parts end at channel {edge}, the layer has {self.in_features}{padded}")
        if len({p.rank for p in self.parts}) != 1:
            raise SpecError("all parts of a layer share one rank")
        if len({p.grid for p in self.parts}) != 1:
            raise SpecError("the weights of all parts of a layer share one grid")
        object.__setattr__(self, "text", _text(_values(self)))
        rows, columns = sum(p.scale_rows for p in self.parts), sum(p.bytes_per_row for p in self.parts)
        scales = (rows, self.out_features) if self.grid != NVFP4 else (self.out_features, rows)
        shapes = (("weight", (self.out_features, columns)), ("weight_scale", scales))
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
    def grid(self) -> str:
        """Of the weight's codes: `codes.INT` or `codes.NVFP4`."""
        return self.parts[0].grid

    @property
    def weight_only(self) -> bool:
        return all(p.activation is None for p in self.parts)

    def row_axis(self, name: str) -> int:
        """Along which axis of a tensor of this name that has rows the out-channels lie."""
        return int(name == "outer_scale" or (name == "weight_scale" and self.grid != NVFP4))

    def downs(self, tensors: dict):
        """Yields of each part its rows of proj_down, (w, R), where it has principal components, else None."""
        for part in self.parts:
            yield tensors["proj_down"][part.start : part.stop] if part.principal else None

    def split(self, tensors: dict):
        """Yields (part, packed codes (N, bytes), scales (G, N), smoothing (w,) or None) of each part, views
        of `tensors`; on the nvfp4 grid the scales are made of both levels, in fp32."""
        column = row = 0
        for i, part in enumerate(self.parts):
            codes = tensors["weight"][:, column : column + part.bytes_per_row]
            rows = slice(row, row + part.scale_rows)
            if part.grid == NVFP4:
                scales = nvfp4.join(tensors["weight_scale"][:, rows], tensors["outer_scale"][i]).T
            else:
                scales = tensors["weight_scale"][rows]
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
        if self.grid == NVFP4:
            out["outer_scale"] = (len(self.parts), n)
        return out

    def without_learned(self) -> "LinearSpec":
        """What is left when x comes smoothed and transformed where there is a learned transform, and the low
        rank is added elsewhere."""
        plain = lambda p: replace(
            p, rank=0, smooth=p.smooth and not p.kronecker, kronecker=(), per_slice=False, principal=0
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
        grain = part.grid if part.grid == NVFP4 else grain
        words = [f"W{part.weight.bits}A{act}", grain]
        if part.activation is not None and part.activation.outer == "tensor":
            words.append(f"{'fixed' if part.activation.fixed else 'one'} scale a tensor")
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
        words += [f"p{part.principal}"] * bool(part.principal)
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
