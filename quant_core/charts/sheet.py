"""A drawing as sections one below the other, measured in pixels, and what is drawn where matplotlib is not
there."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..store.atomic import replacing
from .style import DARK, MARGIN, SMALL, TEXT, WIDTH, Theme
from .words import page

DPI = 100
INSTALL = "python -m pip install matplotlib"


@dataclass(frozen=True)
class Section:
    """A strip of a drawing over its whole width. height: in pixels; draw(area): draws it; words: what it
    says, for a picture without matplotlib."""

    height: int
    draw: Callable[["Area"], None]
    words: list[str] = field(default_factory=list)


class Area:
    """Where a section is drawn. All lengths are pixels, from the top left corner of the section."""

    def __init__(self, figure, top: int, height: int, theme: Theme) -> None:
        self.figure, self.top, self.height, self.theme = figure, top, height, theme
        self.axes = self.inset(
            0,
            0,
            WIDTH,
            height,
        )
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def inset(self, left: float, top: float, width: float, height: float):
        """Matplotlib's Axes over a part of the area, with nothing on them yet."""
        whole = self.figure.get_size_inches()[1] * DPI
        below = whole - self.top - top - height
        return self.figure.add_axes((left / WIDTH, below / whole, width / WIDTH, height / whole))

    def text(self, x: float, y: float, text: str, size: int = TEXT, color: str = "", **options) -> None:
        """A line whose middle is at y. options: of matplotlib's Text."""
        options = {"va": "center_baseline", "parse_math": False} | options
        self.axes.text(
            x,
            y,
            text,
            fontsize=points(size),
            color=color or self.theme.text,
            **options,
        )

    def box(self, x: float, y: float, width: float, height: float, color, **options) -> None:
        """A filled rectangle. options: of matplotlib's Rectangle."""
        from matplotlib.patches import Rectangle

        options = {"linewidth": 0} | options
        # Not add_patch, which works out the limits of the axes again each time.
        self.axes.add_artist(
            Rectangle(
                (x, y),
                width,
                height,
                facecolor=color,
                **options,
            )
        )

    def plot(self, left: float, top: float, right: float, bottom: float):
        """Axes for a curve with so much room around them, in the theme's colours."""
        axes = self.inset(
            left,
            top,
            WIDTH - left - right,
            self.height - top - bottom,
        )
        axes.set_facecolor(self.theme.panel)
        axes.grid(color=self.theme.line, linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(
            colors=self.theme.muted,
            labelsize=points(SMALL),
            length=0,
            pad=6,
        )
        axes.spines[:].set_visible(False)
        return axes


def points(pixels: float) -> float:
    """A height of type for matplotlib."""
    return pixels * 72 / DPI


def figure(sections: Sequence[Section], theme: Theme = DARK):
    """Matplotlib's Figure of the sections. Raises ImportError without matplotlib."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A user's own matplotlibrc has no say in it.
    with rc_context({"font.family": "DejaVu Sans", "text.usetex": False, "axes.unicode_minus": False}):
        height = sum(s.height for s in sections)
        made = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=theme.background)
        FigureCanvasAgg(made)
        top = 0
        for section in sections:
            section.draw(
                Area(
                    made,
                    top,
                    section.height,
                    theme,
                )
            )
            top += section.height
    return made


def save(path: Path, sections: Sequence[Section], theme: Theme = DARK) -> None:
    """Writes the drawing as a PNG. Raises ImportError without matplotlib."""
    made = figure(sections, theme)
    with replacing(path) as temporary:
        made.savefig(temporary, dpi=DPI, format="png")


def drawn(sections: Sequence[Section], theme: Theme = DARK) -> tuple[torch.Tensor, list[str]]:
    """(the drawing (1, H, W, 3), fp32 in [0, 1], lines for a report).

    A drawing is never worth the hours before it: without matplotlib, or where it fails, the picture says so
    in words, and so do the lines. They are none where all went well.
    """
    try:
        made = figure(sections, theme)
        made.canvas.draw()
        pixels = np.asarray(made.canvas.buffer_rgba())[..., :3]
    except Exception as error:
        missing = isinstance(error, ImportError)
        if not missing:
            logging.exception("Nibble: the chart could not be drawn")
        why = "it needs matplotlib, which is not installed" if missing else f"{type(error).__name__}: {error}"
        todo = f"Run in ComfyUI's Python: {INSTALL}, then restart." if missing else "ComfyUI's log has more."
        said = [line for section in sections for line in section.words]
        return page([f"No chart: {why}.", todo, "", *said], theme), [f"No chart: {why}. {todo}"]
    return torch.from_numpy(pixels.copy()).float()[None] / 255, []


def gap(height: int) -> Section:
    """Nothing, so many pixels high."""
    return Section(height, lambda area: None)


def room_for(text: str, size: int = TEXT) -> float:
    """Pixels that a line takes at most, by the widths of DejaVu Sans: 0.62 of its height a letter."""
    return 0.62 * size * len(text)


def fitting(text: str, pixels: float, size: int = TEXT) -> str:
    """The text, its middle left out where it is longer than that."""
    most = max(4, int(pixels / (0.62 * size)))
    if len(text) <= most:
        return text
    left = (most - 1) // 2
    return text[:left] + "…" + text[len(text) - (most - 1 - left) :]


INSIDE = WIDTH - 2 * MARGIN
