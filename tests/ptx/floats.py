"""Float arithmetic of f32, f16, bf16 and the packed pairs of the last two.

Each result is rounded once, to the nearest. Approximate instructions give the correctly rounded value, where
a GPU may be a few units off in the last place. NaNs are NaNs, but not always with the GPU's bits.
"""

import numpy as np

from comfyui_nibble.tests.ptx.formats import FLOATS, fused_multiply_add
from comfyui_nibble.tests.ptx.operation import Operation
from comfyui_nibble.tests.ptx.parser import Instruction

_SMALLEST_NORMAL = 2.0**-126


def flush(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(values) < _SMALLEST_NORMAL, np.copysign(values.dtype.type(0), values), values)


def saturate(values: np.ndarray) -> np.ndarray:
    """.sat: into [0, 1], NaN to 0."""
    return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))


def maximum(x, y):
    """The larger number; the other one if one is a NaN, and +0 of two zeros."""
    return np.where(x == y, np.where(np.signbit(x), y, x), np.fmax(x, y))


def minimum(x, y):
    return np.where(x == y, np.where(np.signbit(x), x, y), np.fmin(x, y))


def _nan_wins(function):
    return lambda x, y: np.where(np.isnan(x) | np.isnan(y), x.dtype.type(np.nan), function(x, y))


def _arithmetic(arity: int, function, *modifiers: str):
    """A builder that decodes the sources, computes, and rounds."""

    def build(instruction: Instruction) -> Operation:
        form = FLOATS[instruction.type]
        flags = instruction.modifiers("ftz", "sat", *modifiers)
        before = flush if "ftz" in flags and instruction.type == "f32" else lambda v: v
        after = saturate if "sat" in flags else lambda v: v

        def apply(*sources):
            return form.encode(after(before(function(*(before(form.decode(s)) for s in sources)))))

        return Operation((instruction.type,) * arity, apply)

    return build


def _double(function):
    """The function on float64, so that rounding to f32 is all that its value loses."""
    return lambda x: function(x.astype(np.float64))


def _extreme(function):
    def build(instruction: Instruction) -> Operation:
        chosen = _nan_wins(function) if "NaN" in instruction.parts else function
        return _arithmetic(2, chosen, "NaN")(instruction)

    return build


def _sign_bits(function):
    """abs and neg touch the sign bits only."""

    def build(instruction: Instruction) -> Operation:
        flags = instruction.modifiers("ftz")
        form = FLOATS[instruction.type]
        if flags and instruction.type == "f32":
            return Operation(
                ("f32",), lambda x: function(form.encode(flush(form.decode(x))), np.uint32(form.sign))
            )
        return Operation((instruction.type,), lambda x: function(x, x.dtype.type(form.sign)))

    return build


BUILDERS = {
    "add": _arithmetic(2, np.add, "rn"),
    "sub": _arithmetic(2, np.subtract, "rn"),
    "mul": _arithmetic(2, np.multiply, "rn"),
    "fma": _arithmetic(3, fused_multiply_add, "rn"),
    "mad": _arithmetic(3, fused_multiply_add, "rn"),
    "div": _arithmetic(2, np.divide, "rn", "full", "approx"),
    "min": _extreme(minimum),
    "max": _extreme(maximum),
    "abs": _sign_bits(lambda bits, sign: bits & ~sign),
    "neg": _sign_bits(lambda bits, sign: bits ^ sign),
    "sqrt": _arithmetic(1, _double(np.sqrt), "rn", "approx"),
    "rcp": _arithmetic(1, _double(np.reciprocal), "rn", "approx"),
    "rsqrt": _arithmetic(1, _double(lambda x: 1 / np.sqrt(x)), "approx"),
    "ex2": _arithmetic(1, _double(np.exp2), "approx"),
    "lg2": _arithmetic(1, _double(np.log2), "approx"),
    "sin": _arithmetic(1, _double(np.sin), "approx"),
    "cos": _arithmetic(1, _double(np.cos), "approx"),
    "tanh": _arithmetic(1, _double(np.tanh), "approx"),
}
