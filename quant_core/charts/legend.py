"""What the colours of a drawing mean."""

from collections.abc import Sequence

import numpy as np

from .layers import IN_16_BIT
from .sheet import INSIDE, Area, room_for
from .style import MARGIN, SMALL, Color, Theme, scale, standing_out


def precision_colors(names: Sequence[str], theme: Theme) -> dict[str, Color]:
    """{precision: its colour}, of `layers.precisions`' names in their order: more bits stand out more, 16 bit
    is plain."""
    quantized = [name for name in names if name != IN_16_BIT]
    colors: dict[str, Color] = {
        name: scale(np.array((i + 0.6) / (len(quantized) + 0.2)), standing_out(theme))
        for i, name in enumerate(quantized)
    }
    return colors | {IN_16_BIT: theme.plain}


def swatches(area: Area, y: float, entries: Sequence[tuple[str, Color | None]]):
    """Squares with their names, in as many lines as they need (`lines_of`), 36 pixels apart."""
    for (x, line), (name, color) in zip(_places([name for name, _ in entries]), entries, strict=True):
        _swatch(
            area,
            x,
            y + 36 * line,
            name,
            color,
        )


def lines_of(names: Sequence[str]) -> int:
    """How many lines `swatches` takes for these names, at least one."""
    return max((line for _, line in _places(names)), default=0) + 1


def _places(names) -> list[tuple[float, int]]:
    """(x, line) of each name."""
    places, x, line = [], float(MARGIN), 0
    for name in names:
        needs = 52 + room_for(name, SMALL)
        if x > MARGIN and x + needs > MARGIN + INSIDE:
            x, line = float(MARGIN), line + 1
        places.append((x, line))
        x += needs
    return places


def _swatch(area, x, y, name, color):
    """An empty one for None."""
    edge = {} if color is not None else {"edgecolor": area.theme.muted, "linewidth": 1.5}
    area.box(
        x,
        y - 11,
        22,
        22,
        "none" if color is None else color,
        **edge,
    )
    area.text(
        x + 32,
        y,
        name,
        SMALL,
    )


def ramp(area: Area, y: float, low: str, high: str, colors, others: Sequence[tuple[str, Color | None]]):
    """A strip of all colours between its two ends, and squares behind it."""
    x = MARGIN + room_for(low, SMALL) + 12
    area.text(
        MARGIN,
        y,
        low,
        SMALL,
    )
    for i in range(48):
        area.box(
            x + 5 * i,
            y - 11,
            5.5,
            22,
            scale(np.array(i / 47), colors),
        )
    area.text(
        x + 252,
        y,
        high,
        SMALL,
    )
    x += 252 + room_for(high, SMALL) + 30
    for name, color in others:
        _swatch(
            area,
            x,
            y,
            name,
            color,
        )
        x += 32 + room_for(name, SMALL) + 20
