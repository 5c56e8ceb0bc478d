"""The picture of a report: what Nibble Report shows, and Nibble Quantize, Guard and Inspect beside their
text."""

from collections.abc import Mapping, Sequence
from math import prod

import torch

from ..charts.heatmap import bits_map, error_map, kernel_map, size_map
from ..charts.sheet import Section, drawn
from ..charts.style import DARK, Theme
from ..charts.summary import headline, shares, worst_layers
from ..layer.row import Row
from .verdict import verdict

OVERVIEW, ERROR, BITS, SIZE, KERNEL, ALL = "overview", "error", "bits", "size", "kernel", "all"
SHOWN = (OVERVIEW, ERROR, BITS, SIZE, KERNEL, ALL)


def chart(
    rows: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    title: str,
    paths: Mapping[str, str] | None = None,
    show: str = OVERVIEW,
    theme: Theme = DARK,
    marked: frozenset[str] | None = None,
    more: Sequence[Section] = (),
) -> tuple[torch.Tensor, list[str]]:
    """(the picture (1, H, W, 3), fp32 in [0, 1], lines for a report where it could not be drawn).

    shapes: as in `sizes`. paths: {layer: kernel}; without them no map of kernels. show: one of SHOWN; marked:
    layers with a frame, the five worst if not given. more: sections at the end.
    """
    found = verdict(list(rows), shapes)
    top = headline(title, f"{found.word}: {found.sentence}.", found.level)
    if not any(row.quantized and row.block for row in rows):
        return drawn([top, *more], theme)
    wanted = {OVERVIEW: (ERROR, BITS), ALL: (ERROR, BITS, SIZE, KERNEL)}.get(show, (show,))
    sections = [top]
    if show in (OVERVIEW, ALL):
        sections.append(shares(rows, sum(map(prod, shapes.values()))))
    measured = any(row.quantized and row.sqnr_db is not None for row in rows)
    if ERROR in wanted and (measured or show == ERROR):
        sections += [error_map(rows, marked), worst_layers(rows)]
    if BITS in wanted:
        sections.append(bits_map(rows, marked or frozenset()))
    if SIZE in wanted:
        sections.append(size_map(rows))
    if KERNEL in wanted and paths:
        sections.append(kernel_map(rows, paths))
    return drawn([*sections, *more], theme)
