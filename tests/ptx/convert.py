"""mov, cvta and cvt."""

import numpy as np

from comfyui_nibble.tests.ptx.floats import flush, saturate
from comfyui_nibble.tests.ptx.formats import FLOATS, INTEGERS, RAW, UNSIGNED, FloatFormat
from comfyui_nibble.tests.ptx.operation import Operation
from comfyui_nibble.tests.ptx.parser import WIDTHS, Instruction

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _move(instruction: Instruction) -> Operation:
    """mov, also of a vector into one register or of one register into a vector, the first element lowest."""
    instruction.modifiers()
    target, source = instruction.operands
    kind = instruction.type
    if isinstance(source, tuple):
        return _pack(kind, len(source))
    if isinstance(target, tuple):
        return _unpack(kind, len(target))
    return Operation((kind,), lambda x: x)


def _pack(kind: str, count: int) -> Operation:
    def apply(*elements):
        return np.stack(np.broadcast_arrays(*elements), 1).view(RAW[kind])[:, 0]

    return Operation((f"b{WIDTHS[kind] // count}",) * count, apply, take_undefined=True)


def _unpack(kind: str, count: int) -> Operation:
    element = UNSIGNED[WIDTHS[kind] // count]
    return Operation((kind,), lambda x: tuple(np.ascontiguousarray(x)[:, None].view(element).T))


def _convert_address(instruction: Instruction) -> Operation:
    """A generic address is a global address here, for no kernel makes generic addresses of shared memory."""
    if "global" not in instruction.modifiers("to", "global"):
        raise instruction.unsupported()
    return Operation((instruction.type,), lambda x: x)


def _convert(instruction: Instruction) -> Operation:
    target, source = instruction.parts[-2:]
    if target == "tf32" and source == "f32":
        return _to_tf32(instruction)
    if target in INTEGERS and source in INTEGERS:
        return _integer_to_integer(instruction, target, source)
    if target in INTEGERS and source in FLOATS:
        return _float_to_integer(instruction, target, source)
    if target in FLOATS and source in INTEGERS:
        return _integer_to_float(instruction, target, source)
    if target in FLOATS and source in FLOATS:
        return _float_to_float(instruction, target, source)
    raise instruction.unsupported()


def _clipped(values, dtype):
    """Into the range of an integer type; a NaN, which no comparison holds for, becomes 0.

    The ends are set apart from the rest because float64 has no 2^63 - 1, which would be rounded out of the
    range.
    """
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    inside = np.where((values > low) & (values < high), values, 0).astype(dtype)
    return np.where(values >= high, dtype(high), np.where(values <= low, dtype(low), inside))


def _integer_to_integer(instruction: Instruction, target: str, source: str) -> Operation:
    dtype = INTEGERS[target]
    if "sat" in instruction.modifiers("sat", types=2):
        return Operation((source,), lambda x: _clipped(x, dtype))
    return Operation((source,), lambda x: x.astype(dtype))


def _float_to_integer(instruction: Instruction, target: str, source: str) -> Operation:
    """Values outside the range go to its ends, NaN to zero."""
    flags = instruction.modifiers("ftz", "sat", *_TO_INTEGRAL, types=2)
    integral = next((_TO_INTEGRAL[f] for f in flags if f in _TO_INTEGRAL), None)
    if integral is None:
        raise instruction.unsupported("no rounding")
    form, dtype = FLOATS[source], INTEGERS[target]

    def apply(bits):
        return _clipped(integral(form.decode(bits)[:, 0].astype(np.float64)), dtype)

    return Operation((source,), apply)


def _integer_to_float(instruction: Instruction, target: str, source: str) -> Operation:
    instruction.modifiers("rn", types=2)
    form = FLOATS[target]
    if WIDTHS[source] == 64:
        # float64 does not hold them all; numpy rounds to float32 directly.
        if target != "f32":
            raise instruction.unsupported()
        return Operation((source,), lambda x: form.encode(x.astype(np.float32)[:, None]))
    return Operation((source,), lambda x: form.encode(x.astype(np.float64)[:, None]))


def _float_to_float(instruction: Instruction, target: str, source: str) -> Operation:
    """Also the packed form with two sources, of which the first becomes the upper half."""
    flags = instruction.modifiers("rn", "rz", "ftz", "sat", "relu", *_TO_INTEGRAL, types=2)
    into, out_of = FLOATS[target], FLOATS[source]
    integral = next((_TO_INTEGRAL[f] for f in flags if f in _TO_INTEGRAL), lambda v: v)
    if out_of.count != 1:
        raise instruction.unsupported()

    def apply(*sources):
        values = np.concatenate(np.broadcast_arrays(*(out_of.decode(s) for s in reversed(sources))), 1)
        values = integral(flush(values) if "ftz" in flags else values)
        if "relu" in flags:
            values = np.where(values < 0, 0, values)
        if "sat" in flags:
            values = saturate(values)
        return _towards_zero(into, values) if "rz" in flags else into.encode(values)

    return Operation((source,) * into.count, apply)


def _towards_zero(form: FloatFormat, values: np.ndarray) -> np.ndarray:
    """The nearest number, and one lower in its bits, so nearer to zero, where that was farther from zero."""
    nearest = form.round(values)
    beyond = np.abs(form.read(nearest)) > np.abs(values)
    return form.pack(np.where(beyond, nearest - form.raw(1), nearest))


def _to_tf32(instruction: Instruction) -> Operation:
    """rna: to 10 bits after the point, the nearest, ties away from zero; the other bits are left zero."""
    if "rna" not in instruction.modifiers("rna", types=2):
        raise instruction.unsupported()
    return Operation(("b32",), lambda bits: bits + np.uint32(0x1000) & ~np.uint32(0x1FFF))


BUILDERS = {"mov": _move, "cvta": _convert_address, "cvt": _convert}
