"""Integer arithmetic. Results wrap around, as two's complement does."""

import numpy as np

from comfyui_nibble.tests.ptx.formats import INTEGERS, SIGNED, UNSIGNED
from comfyui_nibble.tests.ptx.operation import Operation
from comfyui_nibble.tests.ptx.parser import Instruction


def _wider(dtype) -> type:
    """The numpy type that holds a product of two; Python's integers where numpy has none."""
    bits = 16 * np.dtype(dtype).itemsize
    if bits > 64:
        return object
    return (SIGNED if np.issubdtype(dtype, np.signedinteger) else UNSIGNED)[bits]


def _simple(arity: int, function):
    """A builder of an operation whose sources and result have the instruction's one type."""

    def build(instruction: Instruction) -> Operation:
        instruction.modifiers()
        return Operation((instruction.type,) * arity, function)

    return build


def _full_product(x, y):
    wide = _wider(x.dtype)
    return x.astype(wide) * y.astype(wide)


def _high_half(x, y):
    return (_full_product(x, y) >> 8 * x.itemsize).astype(x.dtype)


def _product(instruction: Instruction):
    """What the multiplication's form gives, and the type that an addend has."""
    form = instruction.modifiers("lo", "hi", "wide")
    if len(form) != 1:
        raise instruction.unsupported()
    kind = instruction.type
    if form == {"wide"}:
        return _full_product, f"{kind[0]}{2 * int(kind[1:])}"
    return (np.multiply if form == {"lo"} else _high_half), kind


def _multiply(instruction: Instruction) -> Operation:
    product, kind = _product(instruction)
    if kind not in INTEGERS:
        raise instruction.unsupported()
    return Operation((instruction.type,) * 2, product)


def _multiply_add(instruction: Instruction) -> Operation:
    product, kind = _product(instruction)
    if kind not in INTEGERS:
        raise instruction.unsupported()
    return Operation((instruction.type, instruction.type, kind), lambda x, y, z: product(x, y) + z)


def _quotient(x, y):
    """Rounded towards zero. The ISA leaves a division by zero open; here it gives all ones."""
    x, y = np.broadcast_arrays(x, y)
    divisor = np.where(y == 0, y.dtype.type(1), y)
    floor = x // divisor
    # numpy rounds down: a quotient that is inexact and negative is one too low.
    low = (floor * divisor != x) & ((x < 0) != (divisor < 0))
    return np.where(y == 0, ~y.dtype.type(0), floor + low.astype(x.dtype))


def _remainder(x, y):
    return x - _quotient(x, y) * y


BUILDERS = {
    "add": _simple(2, np.add),
    "sub": _simple(2, np.subtract),
    "min": _simple(2, np.minimum),
    "max": _simple(2, np.maximum),
    "neg": _simple(1, np.negative),
    "abs": _simple(1, np.abs),
    "mul": _multiply,
    "mad": _multiply_add,
    "div": _simple(2, _quotient),
    "rem": _simple(2, _remainder),
}
