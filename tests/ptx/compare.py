"""setp and selp."""

import numpy as np

from comfyui_nibble.tests.ptx.floats import flush
from comfyui_nibble.tests.ptx.formats import FLOATS
from comfyui_nibble.tests.ptx.operation import Operation
from comfyui_nibble.tests.ptx.parser import Instruction

_INTEGER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _float_comparison(name: str):
    """Ordered comparisons are false for a NaN, those whose name ends in u true."""
    unordered = lambda x, y: np.isnan(x) | np.isnan(y)
    if name in ("nan", "num"):
        return unordered if name == "nan" else lambda x, y: ~unordered(x, y)
    plain = _INTEGER.get(name.removesuffix("u"))
    if plain is None or name in ("lo", "ls", "hi", "hs"):
        return None
    if name.endswith("u"):
        return lambda x, y: plain(x, y) | unordered(x, y)
    return lambda x, y: plain(x, y) & ~unordered(x, y)


def _set_predicate(instruction: Instruction) -> Operation:
    """setp p|q, a, b{, c}: q gets the opposite of p, or with packed types the comparison of the upper
    halves."""
    name, kind = instruction.parts[0], instruction.type
    flags = instruction.modifiers(name, "ftz", *_COMBINE)
    combiner = next((_COMBINE[f] for f in flags & set(_COMBINE)), None)
    form = FLOATS.get(kind)
    compare = _float_comparison(name) if form else _INTEGER.get(name)
    if compare is None or (form and form.count == 2 and combiner):
        raise instruction.unsupported()

    def apply(x, y, *third):
        if form is None:
            found, opposite = compare(x, y), None
        else:
            x, y = form.decode(x), form.decode(y)
            halves = compare(flush(x), flush(y)) if "ftz" in flags and kind == "f32" else compare(x, y)
            found, opposite = halves[:, 0], (halves[:, 1] if form.count == 2 else None)
        opposite = ~found if opposite is None else opposite
        return tuple(combiner(v, *third) for v in (found, opposite)) if combiner else (found, opposite)

    return Operation((kind, kind, "pred") if combiner else (kind, kind), apply)


def _select(instruction: Instruction) -> Operation:
    instruction.modifiers()
    return Operation(
        (instruction.type, instruction.type, "pred"), lambda x, y, chosen: np.where(chosen, x, y)
    )


BUILDERS = {"setp": _set_predicate, "selp": _select}
