"""Maps of a model's layers: block by kind of layer, coloured by error, bits, size or kernel."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..layer.row import Row
from .layers import Panel, panels, precision, precisions, worst
from .legend import lines_of, precision_colors, ramp, swatches
from .sheet import INSIDE, Area, Section, fitting, room_for
from .style import CATEGORIES, MARGIN, SMALL, TITLE, Color, Theme, readable_on, scale, standing_out, to_hex

CELL, LEAST = 26, 9  # height of a cell; least width
WIDEST, SPOKEN = 112, 84  # most width, and the width from which a cell says its value
HEAD, SPACE, LEGEND = 84, 40, 62  # of a map's title, between two panels, of a legend


@dataclass(frozen=True)
class Map:
    """What a map shows. color(row, theme): of a cell, None for one that is drawn empty. legend: how much is
    what; marked: names of layers with a frame."""

    title: str
    gloss: str
    color: Callable[[Row, Theme], Color | None]
    legend: Callable[[Area, float], None]
    lines: int = 1
    marked: frozenset[str] = frozenset()
    value: Callable[[Row], str] = lambda row: ""


def heat_map(rows: Sequence[Row], shown: Map) -> Section:
    """The section of a map. Rows without a block have no place in it."""
    groups = panels(rows)
    labels = max((room_for(kind, SMALL) for p in groups for kind in p.kinds), default=0)
    left = MARGIN + min(300.0, labels) + 14
    heights = [SPACE + CELL * len(p.kinds) + SPACE for p in groups]
    height = HEAD + sum(heights) + LEGEND + (shown.lines - 1) * 36

    def draw(area: Area):
        area.text(MARGIN, 24, shown.title, TITLE, weight="bold")
        area.text(MARGIN, 62, shown.gloss, SMALL, area.theme.muted)
        top = float(HEAD)
        for panel, taken in zip(groups, heights, strict=True):
            _panel(area, panel, left, top, shown)
            top += taken
        shown.legend(area, top + 22)

    return Section(height, draw, [])


def _panel(area, panel: Panel, left: float, top: float, shown: Map):
    width = min(WIDEST, max(LEAST, (MARGIN + INSIDE - left) / max(1, len(panel.numbers))))
    space = 2 if width > 12 else 1
    count = f"{len(panel.numbers)} {panel.title}" if panel.title.endswith("blocks") else panel.title
    area.text(left, top + 20, count, SMALL, area.theme.muted)
    top += SPACE
    for k, kind in enumerate(panel.kinds):
        middle = top + CELL * (k + 0.5)
        area.text(left - 14, middle, fitting(kind, left - MARGIN - 14, SMALL), SMALL, ha="right")
    for (line, block), row in panel.cells.items():
        color = shown.color(row, area.theme)
        place = (left + block * width, top + line * CELL, width - space, CELL - space)
        if color is None:
            area.box(*place, "none", edgecolor=area.theme.line, linewidth=1.5)
        else:
            area.box(*place, color)
            if width >= SPOKEN:
                x, y = place[0] + place[2] / 2, place[1] + place[3] / 2
                area.text(x, y, shown.value(row), 18, readable_on(to_hex(color)), ha="center")
        if row.name in shown.marked:
            area.box(*place, "none", edgecolor=area.theme.text, linewidth=2.5, zorder=3)
    below = top + CELL * len(panel.kinds) + 15
    every = max(1, math.ceil(46 / width))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if n >= every)
    for i, number in enumerate(panel.numbers):
        if i % every == 0:
            area.text(left + (i + 0.5) * width - space / 2, below, number, 18, area.theme.muted, ha="center")


def error_map(rows: Sequence[Row], marked: frozenset[str] | None = None) -> Section:
    """Errors in dB; what stands out is the worst. marked: layers that changed, with a frame; the five worst
    if not given."""
    measured = [r.sqnr_db for r in rows if r.block and r.sqnr_db is not None and math.isfinite(r.sqnr_db)]
    low = 5 * math.floor(min(measured, default=10) / 5)
    high = max(low + 10, 5 * math.ceil(float(np.quantile(measured, 0.95)) / 5) if measured else low + 20)

    def color(row, theme):
        if not row.quantized:
            return theme.plain
        if row.sqnr_db is None:
            return None
        part = (high - min(max(row.sqnr_db, low), high)) / (high - low)
        return scale(np.array(part), standing_out(theme))

    def legend(area, y):
        others = [("16 bit", area.theme.plain)]
        if any(r.block and r.quantized and r.sqnr_db is None for r in rows):
            others.append(("not measured", None))
        ramp(area, y, f"{high} dB, good", f"{low} dB, poor", standing_out(area.theme), others)

    if marked is None:
        marked = frozenset(row.name for row in worst(rows))
        gloss = "20 dB: an output 10 % off. Framed: the five worst."
    else:
        gloss = "20 dB: an output 10 % off. Framed: what changed."
    value = lambda row: "" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB"
    return heat_map(rows, Map("Error of each layer", gloss, color, legend, 1, marked, value))


def bits_map(rows: Sequence[Row], marked: frozenset[str] = frozenset()) -> Section:
    """Bits of weights and of inputs, each combination a colour, more bits standing out more."""
    counts = {name: n for name, n, _ in precisions([row for row in rows if row.block])}
    of = lambda name, theme: precision_colors(list(counts), theme)[name]
    entries = [(name, f"{name} · {n}") for name, n in counts.items()]
    legend = lambda area, y: swatches(area, y, [(text, of(name, area.theme)) for name, text in entries])
    gloss = "Bits of the weights x bits of the layer's input · number of layers."
    lines = lines_of([text for _, text in entries])
    color = lambda row, theme: of(precision(row), theme)
    return heat_map(rows, Map("Bits of each layer", gloss, color, legend, lines, marked, precision))


def size_map(rows: Sequence[Row]) -> Section:
    """Memory of each layer with all side data; the largest stand out. A layer in 16 bit counts 2 bytes a
    weight."""
    size = lambda row: row.nbytes or 2 * row.weights
    most = max((size(row) for row in rows if row.block), default=1)
    color = lambda row, theme: scale(np.array(size(row) / most), standing_out(theme))
    legend = lambda area, y: ramp(area, y, "0 MB", f"{most / 1e6:.3g} MB", standing_out(area.theme), [])
    return heat_map(
        rows, Map("Size of each layer", "In memory, scales and other side data counted.", color, legend)
    )


def kernel_map(rows: Sequence[Row], paths: Mapping[str, str]) -> Section:
    """What computes each layer. paths: {layer: its kernel}, of `kernels.paths_of`."""
    found = list(dict.fromkeys(paths[row.name] for row in rows if row.block and row.name in paths))
    count = lambda path: sum(row.block != "" and paths.get(row.name) == path for row in rows)
    found = sorted(found, key=count, reverse=True)
    colors = {path: CATEGORIES[min(i, len(CATEGORIES) - 1)] for i, path in enumerate(found)}
    rest = "16 bit, by PyTorch"
    color = lambda row, theme: colors.get(paths.get(row.name, ""), theme.plain)
    names = [f"{path} · {count(path)}" for path in found]

    def legend(area, y):
        entries = [(name, colors[path]) for name, path in zip(names, found, strict=True)]
        swatches(area, y, [*entries, (rest, area.theme.plain)])

    gloss = "Tensor cores are fast, eager PyTorch is slow. · number of layers"
    shown = Map("What computes each layer", gloss, color, legend, lines_of([*names, rest]))
    return heat_map(rows, shown)
