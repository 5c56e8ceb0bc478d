"""What stays in 16 bit of a model, and why: a report counts all of its weights, not the quantized layers
alone."""

import re
from collections.abc import Mapping
from math import prod

from ..calibration.observe import why_left_out
from ..families import Family
from ..families.rules import EMBEDDING, FINAL, SMALLEST
from ..layer.row import Row

TABLE = 2**20  # values from which a tensor that is no layer's weight has a row
# Width of the last of three dimensions from which they are a bank of matrices; below it is a convolution's
# window.
BANK = 16
_EMBEDDER = re.compile(
    r"(^|[._])(t|time\w*|te?xt\w*|cap\w*|label\w*|vector\w*|guidance\w*|cond\w*|pool\w*|clip\w*|t5\w*|llm\w*)([._]|$)",
    re.I,
)
_ENDS = re.compile(
    r"^(img|x|proj|conv|patch|input|linear|out|output)(_(in|out|proj|layer|embedding|embedder))?([.]|$)", re.I
)


def kept_rows(
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    rows: list[Row],
    calibration=None,
    otherwise="no linear layer of the network",
) -> list[Row]:
    """A row for each weight of the model that `rows` have none of: linear layers, convolutions, banks of
    expert weights, tables.

    shapes: {key: shape} of the whole model, in ComfyUI's names. otherwise: why a layer that the family takes
    has no row. The rows' `block` is empty: they were in no plan.
    """
    have = {row.name for row in rows}
    plan = {layer.name: layer for layer in family.layers(shapes)}
    out = []
    for key, shape in shapes.items():
        name = key.removesuffix(".weight")
        layer = name != key and len(shape) > 1
        if name in have or not (layer or _is_bank(shape) or prod(shape) >= TABLE):
            continue
        if name in plan:
            why = why_left_out(plan[name], calibration) or otherwise
        else:
            why = _why(name, shape, family, layer)
        outputs, inputs = (prod(shape[:-1]), shape[-1]) if _is_bank(shape) else (shape[0], prod(shape[1:]))
        out.append(Row(name, "", inputs, outputs, "16 bit", note=why))
    return out


def _is_bank(shape) -> bool:
    """(experts, out-channels, in-channels)."""
    return len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= BANK


def _why(name, shape, family, layer) -> str:
    if _is_bank(shape):
        return f"a bank of {shape[0]} matrices of {shape[1]} x {shape[2]}: no kernel takes it"
    if not layer:
        return "a table"
    if len(shape) > 2:
        return (
            f"{shape[2]}-wide convolution"
            if len(shape) == 3
            else f"{'x'.join(map(str, shape[2:]))} convolution"
        )
    if why := family.why_kept(name):
        return f"kept by the map: {why}"
    if min(shape) < SMALLEST:
        return f"{shape[0]} x {shape[1]}, narrower than {SMALLEST}"
    by = "map" if family.rules else "rules"
    if FINAL.search(name) or _ENDS.search(name):
        return f"first or last projection, kept by the {by}"
    if EMBEDDING.search(name) or _EMBEDDER.search(name):
        return f"embedder, kept by the {by}"
    return "outside of repeated blocks"
