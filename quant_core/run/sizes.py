"""How large a model is, before and after."""

from collections.abc import Iterable, Mapping
from math import prod

from ..layer.row import Row


def sizes(rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Bytes (after, before) of a model, all that is not quantized at 16 bit. shapes: {key: shape} of the
    whole model."""
    done = [r for r in rows if r.quantized]
    total = sum(map(prod, shapes.values()))
    return 2 * (total - sum(r.weights for r in done)) + sum(r.nbytes for r in done), 2 * total
