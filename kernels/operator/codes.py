"""What activations and weights are rounded to: two frozen descriptions, of which a layer's spec is made, and
what they make of a tensor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import nvfp4, quantizers
from .errors import NamedError
from .packing import PACKABLE_BITS, pack, unpack
from .quantizers import GROUP, code_range

GELU_SHIFT = 0.171875  # above -min(GELU) = 0.17; nunchaku's and comfy-kitchen's constant
INT, NVFP4 = "int", "nvfp4"


class SpecError(NamedError):
    """A layer description that contradicts itself or does not fit its tensors."""


@dataclass(frozen=True)
class ActivationSpec:
    """Dynamic quantization of Tx. granularity: "token", "group" (64 channels of one token) or "tensor".

    The scale is clip * absmax / largest code; what lies beyond is clamped. bits: 1 (signs: -1 and 1, never
    unsigned), 2, 3, 4 or 8. grid: INT, or NVFP4, whose codes are doubled e2m1 values and whose scales are
    those of `nvfp4.block_scales`; either: with either of its two scales a group. outer: what has the fp32
    scale above those of groups, "token", or as in ComfyUI "tensor": all tokens of the part together, so that
    NaN in one of them reaches all. fixed: that scale of the tensor as a file states it, 0 where it is
    measured.
    """

    bits: int = 4
    granularity: str = "group"
    group: int = GROUP
    unsigned: bool = False
    shift: float = 0.0
    clip: float = 1.0
    grid: str = INT
    either: bool = False
    outer: str = "token"
    fixed: float = 0.0

    def __post_init__(self):
        _check_grid(self)
        self._check_outer()
        plain = not self.unsigned and self.shift == 0 and self.clip == 1
        if not (self.grid == INT or plain):
            raise SpecError("e2m1 activation codes have a sign, and neither a shift nor a clip")
        if not (self.grid == NVFP4 or not self.either):
            raise SpecError(f"either of two scales a group goes with {NVFP4} only")
        if not (0 < self.clip <= 1):
            raise SpecError(f"clip must be above 0 and at most 1, found {self.clip}")
        if self.bits not in (1, 2, 3, 4, 8):
            raise SpecError(f"activation bits must be 1, 2, 3, 4 or 8, found {self.bits}")
        if not (self.bits > 1 or not self.unsigned):
            raise SpecError(
                "1-bit activation codes are -1 and 1, they cannot be unsigned: take 2 bits, or signed"
            )
        if self.granularity not in ("token", "group", "tensor"):
            raise SpecError(f"unknown activation granularity {self.granularity!r}")
        wide = self.unsigned or self.bits == 8  # 8 bits have room for a shifted range with a sign
        if not (self.shift == 0 or wide):
            raise SpecError("a shift goes with unsigned or 8-bit activation codes only")

    def _check_outer(self):
        if self.outer not in ("token", "tensor"):
            raise SpecError(f"unknown outer scale {self.outer!r}: expected token or tensor")
        if self.outer == "tensor" and (self.grid == INT or self.either):
            raise SpecError(f"an outer scale of the tensor goes with {NVFP4} and one scale a group only")
        if not (0 <= self.fixed < float("inf") and (self.fixed == 0 or self.outer == "tensor")):
            raise SpecError(f"a fixed outer scale is positive and of the tensor, found {self.fixed}")

    @property
    def measures_tensor(self) -> bool:
        """Whether the scale of a token depends on all other tokens."""
        return self.granularity == "tensor" or (self.outer == "tensor" and not self.fixed)

    @property
    def top(self) -> int:
        """The largest code."""
        return nvfp4.TOP if self.grid == NVFP4 else code_range(self.bits, self.unsigned)[1]

    def rounded(
        self, tx: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes (M, K) int8, uint8 where they are unsigned, scale (M or 1, groups) fp32) of Tx (M, K)
        fp32. dtype: of the x that it was made from, as `nvfp4.tensor_scale` takes it."""
        if self.grid == NVFP4:
            absmax = nvfp4.group_absmax(tx)
            scale = nvfp4.block_scales(tx, absmax, self._outer_of(absmax, dtype), self.either)
            return nvfp4.quantize(tx, scale), scale
        scale = quantizers.absmax_scale(tx, self.bits, self.granularity, self.group, self.unsigned, self.clip)
        return quantizers.quantize(tx, scale, self.bits, self.granularity, self.group, self.unsigned), scale

    def _outer_of(self, absmax, dtype):
        if self.fixed:
            return torch.full((), self.fixed, device=absmax.device)
        if self.outer == "tensor":
            return nvfp4.tensor_scale(nvfp4.largest(absmax), dtype)
        return nvfp4.token_scale(absmax, self.either)


@dataclass(frozen=True)
class WeightSpec:
    """Static quantization of W T^-1. granularity: "channel" (a row), "group" (64 in-channels of a row) or
    "tensor". grid: INT, or NVFP4, whose codes are doubled e2m1 values in memory and e2m1 where they are
    packed."""

    bits: int = 4
    granularity: str = "group"
    group: int = GROUP
    grid: str = INT

    def __post_init__(self):
        _check_grid(self)
        if self.bits not in PACKABLE_BITS:
            raise SpecError(f"weight bits must be 2, 4 or 8, found {self.bits}")
        if self.granularity not in ("channel", "group", "tensor"):
            raise SpecError(f"unknown weight granularity {self.granularity!r}")

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """Scales (N or 1, G) fp32 of a folded weight (N, K) fp32, as yet not rounded: from absmax, on NVFP4
        by Four over Six."""
        if self.grid == NVFP4:
            return nvfp4.four_over_six(weight)
        return quantizers.absmax_scale(weight, self.bits, self.granularity, self.group)

    def rounded(
        self, weight: torch.Tensor, dtype: torch.dtype, scale_of: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round to nearest: a folded weight (N, K) fp32 -> codes (N, K) int8, scales (N, G) as they are
        stored: in `dtype`, never 0; on NVFP4 in fp32, e4m3 numbers times a power of two a row.

        scale_of(weight) -> (N, G): `scales` if not given. The codes are rounded against the stored scale, so
        that its own rounding costs nothing.
        """
        scale = (scale_of or self.scales)(weight)
        if self.grid == NVFP4:
            scale = nvfp4.stored(scale)
        else:
            scale = scale.to(dtype).clamp(min=torch.finfo(dtype).tiny)
        return self.codes(weight, scale.float()), scale.expand(weight.shape[0], -1)

    def codes(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes (N, K) int8 of a folded weight (N, K) fp32 at stored scales (N or 1, G) fp32."""
        if self.grid == NVFP4:
            return nvfp4.quantize(weight, scale)
        return quantizers.quantize(weight, scale, self.bits, self.granularity, self.group)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (..., K) -> int8 (..., K bits / 8)."""
        return nvfp4.pack_e2m1(codes) if self.grid == NVFP4 else pack(codes, self.bits)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`: codes (..., K) int8."""
        return nvfp4.unpack_e2m1(packed) if self.grid == NVFP4 else unpack(packed, self.bits)


def four_bits(grid: str) -> tuple[WeightSpec, ActivationSpec]:
    """Weights and activations of 4 bits as methods take them: in groups of 64 on INT, of 16 with either of
    two scales on NVFP4. Raises SpecError for another grid."""
    group, either = (nvfp4.GROUP, True) if grid == NVFP4 else (GROUP, False)
    return WeightSpec(group=group, grid=grid), ActivationSpec(group=group, grid=grid, either=either)


def _check_grid(spec):
    if spec.grid not in (INT, NVFP4):
        raise SpecError(f"unknown grid {spec.grid!r}: expected {INT} or {NVFP4}")
    groups = (spec.bits, spec.granularity, spec.group) == (4, "group", nvfp4.GROUP)
    if not (spec.grid == INT or groups):
        raise SpecError(
            f"{NVFP4} has 4 bits and a scale each {nvfp4.GROUP} channels, found {spec.bits} bits, "
            f"one a {spec.granularity} of {spec.group}"
        )
