"""mma.sync: the tensor-core product of one warp.

Which thread holds which element follows the PTX ISA, section "Warp-level Matrix Instructions", parts "Matrix
Fragments for mma.m16n8k64", "... mma.m16n8k32", "... mma.m16n8k16", "... mma.m16n8k8" and "... mma.m8n8k32".
Their tables share one pattern. With group = lane / 4, thread = lane % 4 and n elements in a 32-bit register:

- A: registers alternate between row `group` and row `group + 8` (only `group` with 8 rows); the columns of a
  register are `thread * n` and the n - 1 after it, and 4 n further in the second pair of registers.
- B: the same with rows for columns; the column is `group`.
- C and D: rows `group`, and `group + 8` from the third register on; columns `thread * 2` and the next.

Integer products are exact. Float products are exact too, and their sum is taken in float64 and rounded once
to f32; a GPU adds in an order and precision of its own, so float results agree only up to the last bits.
"""

from functools import cache

import numpy as np

from comfyui_nibble.tests.ptx.operation import Operation
from comfyui_nibble.tests.ptx.parser import Instruction
from comfyui_nibble.tests.ptx.warp import WARP

COLUMNS = 8

_GROUP, _THREAD = np.divmod(np.arange(WARP), 4)

# Bits of an element, and the shapes (rows, inner size) that take it.
_BITS = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "f16": 16, "bf16": 16, "tf32": 32}
_SHAPES = {
    4: {"m8n8k32": (8, 32), "m16n8k32": (16, 32), "m16n8k64": (16, 64)},
    8: {"m8n8k16": (8, 16), "m16n8k16": (16, 16), "m16n8k32": (16, 32)},
    16: {"m16n8k8": (16, 8), "m16n8k16": (16, 16)},
    32: {"m16n8k4": (16, 4), "m16n8k8": (16, 8)},
}

_UNSIGNED_NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1).astype(np.float64)
_SIGNED_NIBBLES = np.where(_UNSIGNED_NIBBLES > 7, _UNSIGNED_NIBBLES - 16, _UNSIGNED_NIBBLES)


def _bytes_of(registers):
    return np.ascontiguousarray(registers)[..., None].view(np.uint8)


def _halves_of(registers):
    return np.ascontiguousarray(registers)[..., None].view(np.uint16)


# From 32-bit registers to their elements as floats, the lowest first, along a new last axis (or two, for
# nibbles in bytes).
_DECODE = {
    "s4": lambda r: _SIGNED_NIBBLES[_bytes_of(r)],
    "u4": lambda r: _UNSIGNED_NIBBLES[_bytes_of(r)],
    "s8": lambda r: _bytes_of(r).view(np.int8).astype(np.float64),
    "u8": lambda r: _bytes_of(r).astype(np.float64),
    "f16": lambda r: _halves_of(r).view(np.float16).astype(np.float64),
    "bf16": lambda r: (_halves_of(r).astype(np.uint32) << 16).view(np.float32).astype(np.float64),
    # The tensor core does not look at the lowest 13 bits.
    "tf32": lambda r: (r & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64),
}


@cache
def a_places(rows: int, inner: int, bits: int) -> np.ndarray:
    """(rows, inner) of where each element of A lies in a warp's (lane, register, element), flattened."""
    per = 32 // bits
    tall = rows // 8
    lane, register, element = _indices(rows * inner * bits // 1024, per)
    row = _GROUP[lane] + 8 * (register % tall)
    column = _THREAD[lane] * per + element + 4 * per * (register // tall)
    return _inverse(row, column, (rows, inner))


@cache
def b_places(inner: int, bits: int) -> np.ndarray:
    """(inner, 8) of the same for B."""
    per = 32 // bits
    lane, register, element = _indices(inner * COLUMNS * bits // 1024, per)
    row = _THREAD[lane] * per + element + 4 * per * register
    return _inverse(row, _GROUP[lane], (inner, COLUMNS))


def _indices(registers: int, per: int) -> np.ndarray:
    return np.indices((WARP, registers, per)).reshape(3, -1)


def _inverse(row, column, shape) -> np.ndarray:
    places = np.full(shape, -1)
    places[row, column] = np.arange(len(row))
    return places


@cache
def c_places(rows: int) -> np.ndarray:
    """(lane, register) of which element of the flattened (rows, 8) result each register holds."""
    register = np.arange(rows // 4)
    row = _GROUP[:, None] + 8 * (register // 2)
    return row * COLUMNS + _THREAD[:, None] * 2 + register % 2


def _matrices(registers, kind: str, places: np.ndarray) -> np.ndarray:
    """(warps, *places.shape) floats from arrays of one register each."""
    stacked = np.stack(registers, 1).reshape(-1, WARP, len(registers))
    return _DECODE[kind](stacked).reshape(len(stacked), -1)[:, places]


def _accumulate(product: np.ndarray, c: np.ndarray, saturate: bool) -> np.ndarray:
    """D's bits. The float64 product of integers is exact, for its sums stay below 2^53."""
    if c.dtype == np.float32:
        return (product + c).astype(np.float32).view(np.uint32)
    total = product.astype(np.int64) + c
    if saturate:
        total = np.clip(total, -(2**31), 2**31 - 1)
    return total.astype(np.int32).view(np.uint32)


def _shape(instruction: Instruction) -> tuple[int, int]:
    """Rows and inner size, after checks of all that the opcode names."""
    parts = instruction.parts
    if len(parts) not in (9, 10) or parts[:2] != ("sync", "aligned") or parts[3:5] != ("row", "col"):
        raise instruction.unsupported()
    d, a, b, c = parts[-4:]
    shape = _SHAPES.get(_BITS.get(a), {}).get(parts[2])
    if a in ("f16", "bf16", "tf32"):
        right = a == b and d == c == "f32" and len(parts) == 9
    else:
        right = _BITS.get(a) == _BITS.get(b) and d == c == "s32" and parts[5:-4] in ((), ("satfinite",))
    if not (shape and right):
        raise instruction.unsupported()
    return shape


def _mma(instruction: Instruction) -> Operation:
    rows, inner = _shape(instruction)
    a_kind, b_kind, c_kind = instruction.parts[-3:]
    bits = _BITS[a_kind]
    a_count, b_count, c_count = rows * inner * bits // 1024, inner * COLUMNS * bits // 1024, rows // 4
    saturate = "satfinite" in instruction.parts
    places = c_places(rows)
    c_dtype = np.float32 if c_kind == "f32" else np.int32

    def apply(*registers):
        a = _matrices(registers[:a_count], a_kind, a_places(rows, inner, bits))
        b = _matrices(registers[a_count : a_count + b_count], b_kind, b_places(inner, bits))
        c = np.stack(registers[a_count + b_count :], 1).view(c_dtype)
        product = np.matmul(a, b).reshape(len(a), -1)[:, places].reshape(c.shape)
        return tuple(_accumulate(product, c, saturate).T)

    return Operation(("b32",) * (a_count + b_count + c_count), apply, convergent=True)


BUILDERS = {"mma": _mma}
