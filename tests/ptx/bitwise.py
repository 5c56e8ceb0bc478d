"""Logic, shifts, bit fields and byte permutes, after the pseudocode of the PTX ISA."""

import numpy as np

from comfyui_nibble.tests.ptx.formats import INTEGERS, UNSIGNED
from comfyui_nibble.tests.ptx.operation import Operation
from comfyui_nibble.tests.ptx.parser import Immediate, Instruction


def _logic(arity: int, function):
    def build(instruction: Instruction) -> Operation:
        instruction.modifiers()
        return Operation((instruction.type,) * arity, function)

    return build


def _width(x: np.ndarray) -> int:
    return 8 * x.itemsize


def _shift_left(x, amount):
    """A shift by the width or more gives zero."""
    inside = np.minimum(amount, _width(x) - 1).astype(x.dtype)
    return np.where(amount < _width(x), x << inside, x.dtype.type(0))


def _shift_right(x, amount):
    """A shift by the width or more gives zero, or copies of the sign of a signed value."""
    shifted = x >> np.minimum(amount, _width(x) - 1).astype(x.dtype)
    if np.issubdtype(x.dtype, np.signedinteger):
        return shifted
    return np.where(amount < _width(x), shifted, x.dtype.type(0))


def _shift(function):
    def build(instruction: Instruction) -> Operation:
        instruction.modifiers()
        return Operation((instruction.type, "u32"), function)

    return build


def _funnel_shift(instruction: Instruction) -> Operation:
    """shf: the 64 bits {b, a} shifted; .l gives the upper word, .r the lower one."""
    way = instruction.modifiers("l", "r", "wrap", "clamp")

    def apply(low, high, amount):
        amount = amount & 31 if "wrap" in way else np.minimum(amount, 32)
        both = high.astype(np.uint64) << 32 | low
        return (_shift_left(both, amount) >> 32 if "l" in way else both >> amount.astype(np.uint64)).astype(
            np.uint32
        )

    return Operation(("u32", "u32", "u32"), apply)


def _low_ones(length, dtype):
    """A value whose lowest `length` bits are set."""
    return ~_shift_left(np.broadcast_to(~dtype.type(0), length.shape), length)


def _extract_field(x, position, length):
    """bfe: a signed field's sign fills what lies above it; a field that leaves the word takes the word's top
    bit for its sign."""
    unsigned = x.view(UNSIGNED[_width(x)])
    position, length = np.broadcast_arrays(position & 0xFF, length & 0xFF)
    mask = _low_ones(np.minimum(length, _width(x)), unsigned.dtype)
    field = _shift_right(unsigned, position) & mask
    if x.dtype == unsigned.dtype:
        return field
    top = np.minimum(position + length, _width(x)).astype(np.int64) - 1
    negative = (_shift_right(unsigned, np.maximum(top, 0)) & 1).astype(bool) & (length > 0)
    own = mask & _shift_right(np.broadcast_to(~unsigned.dtype.type(0), position.shape), position)
    return np.where(negative, field | ~own, field).view(x.dtype)


def _insert_field(source, into, position, length):
    """bfi: the low bits of `source` put into `into`; bits that would leave the word are dropped."""
    position, length = np.broadcast_arrays(position & 0xFF, length & 0xFF)
    mask = _shift_left(_low_ones(np.minimum(length, _width(into)), into.dtype), position)
    return (into & ~mask) | (_shift_left(source, position) & mask)


def _field(arity: int, function):
    def build(instruction: Instruction) -> Operation:
        instruction.modifiers()
        return Operation((instruction.type,) * arity + ("u32", "u32"), function)

    return build


def _permute(instruction: Instruction) -> Operation:
    """prmt: each nibble of the selector picks one of the eight bytes of {b, a}; its top bit asks for the
    byte's sign instead."""
    instruction.modifiers()

    def apply(a, b, selector):
        both = np.stack(np.broadcast_arrays(a, b), 1).view(np.uint8)
        nibbles = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & 15
        rows = np.arange(max(len(both), len(selector)))[:, None] % len(both)
        picked = both[rows, nibbles & 7]
        sign = np.where(picked & 0x80, np.uint8(0xFF), np.uint8(0))
        return np.where(nibbles & 8, sign, picked).view(np.uint32)[:, 0]

    return Operation(("u32", "u32", "u32"), apply, take_undefined=True)


def _look_up(instruction: Instruction) -> Operation:
    """lop3: bit i of the table is the result where the bits of a, b, c spell the number i."""
    instruction.modifiers()
    table = instruction.operands[-1]
    if not isinstance(table, Immediate):
        raise instruction.unsupported("the table must be a constant")

    def apply(a, b, c, _):
        out = np.uint32(0)
        for row in range(8):
            if table.value >> row & 1:
                out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return np.atleast_1d(out)

    return Operation(("u32",) * 4, apply)


def _bits(x: np.ndarray) -> np.ndarray:
    """(threads, width), the lowest bit first."""
    return np.unpackbits(np.ascontiguousarray(x)[:, None].view(np.uint8), axis=1, bitorder="little")


def _count_ones(x):
    return _bits(x).sum(1, dtype=np.uint32)


def _leading_zeros(x):
    found = _bits(x)[:, ::-1]
    return np.where(found.any(1), found.argmax(1), _width(x)).astype(np.uint32)


def _reverse(x):
    return np.packbits(_bits(x)[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]


def _invert(instruction: Instruction) -> Operation:
    instruction.modifiers()
    return Operation((instruction.type,), np.logical_not if instruction.type == "pred" else np.invert)


def _only_integers(build):
    """The builder, for a type that is an integer or a predicate."""

    def checked(instruction: Instruction) -> Operation:
        if instruction.type != "pred" and instruction.type not in INTEGERS:
            raise instruction.unsupported()
        return build(instruction)

    return checked


BUILDERS = {
    name: _only_integers(build)
    for name, build in {
        "and": _logic(2, np.bitwise_and),
        "or": _logic(2, np.bitwise_or),
        "xor": _logic(2, np.bitwise_xor),
        "not": _invert,
        "shl": _shift(_shift_left),
        "shr": _shift(_shift_right),
        "shf": _funnel_shift,
        "bfe": _field(1, _extract_field),
        "bfi": _field(2, _insert_field),
        "prmt": _permute,
        "lop3": _look_up,
        "popc": _logic(1, _count_ones),
        "clz": _logic(1, _leading_zeros),
        "brev": _logic(1, _reverse),
    }.items()
}
