"""Number formats: the numpy type behind each PTX type, and how floats of each width are read and rounded."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
INTEGERS = {
    f"{kind}{bits}": SIGNED[bits] if kind == "s" else UNSIGNED[bits] for kind in "bus" for bits in UNSIGNED
}

# How a register of each type is handed to an operation: floats as their bits, which FloatFormat decodes.
RAW = {
    **INTEGERS,
    "pred": np.bool_,
    "f16": np.uint16,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "tf32": np.uint32,
    "f32": np.uint32,
}


@dataclass(frozen=True)
class FloatFormat:
    """A float type of a register that holds `count` numbers, the first in the lowest bits."""

    raw: type
    count: int
    read: Callable[[np.ndarray], np.ndarray]
    round: Callable[[np.ndarray], np.ndarray]

    @property
    def sign(self) -> int:
        """A register's sign bits."""
        bits = 8 * np.dtype(self.raw).itemsize
        return sum(1 << (bits * (i + 1) - 1) for i in range(self.count))

    def decode(self, bits: np.ndarray) -> np.ndarray:
        """(threads, count) floats: float32 for f32, whose numpy arithmetic is IEEE's, float64 for the 16-bit
        types."""
        return self.read(np.ascontiguousarray(bits)[:, None].view(self.raw))

    def encode(self, values: np.ndarray) -> np.ndarray:
        """The bits of (threads, count) floats, rounded to the nearest, ties to even."""
        return self.pack(self.round(values))

    def pack(self, numbers: np.ndarray) -> np.ndarray:
        """Registers of (threads, count) numbers that already are bits."""
        register = UNSIGNED[8 * np.dtype(self.raw).itemsize * self.count]
        return np.ascontiguousarray(numbers, self.raw).view(register)[:, 0]


def _read_f32(bits):
    return bits.view(np.float32)


def _read_f16(bits):
    return bits.view(np.float16).astype(np.float64)


def _read_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _round_f32(values):
    return values.astype(np.float32).view(np.uint32)


def _round_f16(values):
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))


def _round_bf16(values):
    bits = odd_float32(values.astype(np.float64)).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)


def odd_float32(values: np.ndarray) -> np.ndarray:
    """float64 to float32; an inexact value goes to whichever neighbour has an odd last bit.

    Rounding that result to fewer bits is then right: rounding to the nearest twice would not be, since the
    first rounding can land on the second one's tie.
    """
    near = np.ascontiguousarray(values.astype(np.float32))
    back = near.astype(np.float64)
    bits = near.view(np.int32)
    inexact_and_even = np.isfinite(values) & (back != values) & (bits & 1 == 0)
    step = np.where(np.abs(values) > np.abs(back), 1, -1).astype(np.int32)
    return np.where(inexact_and_even, bits + step, bits).view(np.float32)


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float64, rounded to odd, so that the rounding to f32, bf16 or f16 that follows is the only
    one.

    The product of two f32 is exact in float64; the sum's error is known exactly (two-sum) and says which way
    to go.
    """
    product, z = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)
    even = total.view(np.int64) & 1 == 0
    towards = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(np.isfinite(error) & (error != 0) & even, towards, total)


FLOATS = {
    "f32": FloatFormat(np.uint32, 1, _read_f32, _round_f32),
    "f16": FloatFormat(np.uint16, 1, _read_f16, _round_f16),
    "f16x2": FloatFormat(np.uint16, 2, _read_f16, _round_f16),
    "bf16": FloatFormat(np.uint16, 1, _read_bf16, _round_bf16),
    "bf16x2": FloatFormat(np.uint16, 2, _read_bf16, _round_bf16),
}
