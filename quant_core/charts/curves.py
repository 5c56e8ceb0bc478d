"""Curves: errors over the steps of a sampling, losses over those of a training."""

from collections.abc import Mapping, Sequence

from .sheet import Section, points
from .style import CATEGORIES, MARGIN, SMALL, TITLE

HEIGHT = 440


def curves(
    title: str,
    gloss: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    log: bool = False,
    reverse: bool = False,
) -> Section:
    """Named lines of (x, y), their names below. across: what x is; reverse: from large to small x; log: y on
    a logarithmic axis."""
    extra = 34 * ((len(lines) - 1) // 2)
    show = len(lines) > 1

    def draw(area):
        area.text(
            MARGIN,
            24,
            title,
            TITLE,
            weight="bold",
        )
        area.text(
            MARGIN,
            62,
            gloss,
            SMALL,
            area.theme.muted,
        )
        axes = area.plot(
            96,
            100,
            MARGIN,
            96 + (extra + 34) * show,
        )
        for (_, line), color in zip(lines.items(), _colors(len(lines)), strict=True):
            axes.plot(
                *zip(*line, strict=True), color=color, linewidth=3, marker="o" if len(line) < 30 else ""
            )
        axes.set_xlabel(across, fontsize=points(SMALL), color=area.theme.muted)
        if log:
            axes.set_yscale("log")
        if reverse:
            axes.invert_xaxis()
        for i, (name, color) in enumerate(zip(lines, _colors(len(lines)), strict=True) if show else ()):
            x, y = MARGIN + 450 * (i % 2), area.height - 30 - extra + 34 * (i // 2)
            area.box(
                x,
                y - 3,
                30,
                6,
                color,
            )
            area.text(
                x + 42,
                y,
                name,
                SMALL,
            )

    return Section(HEIGHT + (extra + 34) * show, draw, [])


def _colors(count: int) -> list[str]:
    return [CATEGORIES[i % len(CATEGORIES)] for i in range(count)]
