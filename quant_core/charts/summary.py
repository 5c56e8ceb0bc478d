"""What a person should read first: a title, a verdict, what the model is made of, and its worst layers."""

import textwrap
from collections.abc import Sequence

from ..layer.row import Row
from .layers import IN_16_BIT, off, place_of, precision, precisions, worst
from .legend import lines_of, precision_colors, swatches
from .sheet import INSIDE, Area, Section, fitting
from .style import LEVELS, MARGIN, SMALL, TEXT, TITLE, readable_on, standing_out

LINE = 34


def headline(title: str, sentence: str = "", level: str = "") -> Section:
    """A title and a sentence below it. level: "green", "amber" or "red" puts its sign in front, "" none."""
    indent = 46 if level else 0
    lines = textwrap.wrap(sentence, int((INSIDE - indent) / (0.56 * TEXT)))
    height = 66 + LINE * len(lines) + 20 * bool(lines)

    def draw(area: Area):
        area.text(MARGIN, 40, fitting(title, INSIDE, TITLE), TITLE, weight="bold")
        if level:
            color, sign = LEVELS[level]
            area.box(MARGIN, 70, 32, 32, color)
            area.text(MARGIN + 16, 87, sign, TEXT, readable_on(color), ha="center", weight="bold")
        for i, line in enumerate(lines):
            area.text(MARGIN + indent, 86 + LINE * i, line)

    return Section(height, draw, [title, *lines, ""])


def shares(rows: Sequence[Row], total: int) -> Section:
    """The model's weights by their bits, as one bar of its whole width, and its memory. total: weights of the
    whole model; those without a row count as 16 bit."""
    found = {name: n for name, _, n in precisions([row for row in rows if row.quantized])}
    done = [row for row in rows if row.quantized]
    rest = max(0, total - sum(found.values()))
    parts = [(name, n / max(1, total)) for name, n in [*found.items(), (IN_16_BIT, rest)] if n]
    size = sum(row.nbytes for row in done) + 2 * rest
    said = f"{amount(size)} instead of {amount(2 * total)} in 16 bit."
    gloss = f"{said} Bits of the weights x of the inputs:"

    names = [f"{name}: {percent(part)}" for name, part in parts]

    def draw(area: Area):
        area.text(MARGIN, 24, "The whole model", TITLE, weight="bold")
        area.text(MARGIN, 62, gloss, SMALL, area.theme.muted)
        colors = precision_colors([name for name, _ in parts], area.theme)
        x = float(MARGIN)
        for name, part in parts:
            area.box(x, 88, max(2.0, INSIDE * part - 2), 40, colors[name])
            x += INSIDE * part
        swatches(area, 154, [(text, colors[name]) for text, (name, _) in zip(names, parts, strict=True)])

    height = 190 + 36 * (lines_of(names) - 1)
    return Section(height, draw, [said, *(f"{name} of the weights" for name in names), ""])


def worst_layers(rows: Sequence[Row], count: int = 5) -> Section:
    """The layers with the largest errors, a bar each; none where nothing was measured."""
    found = worst(rows, count)
    if not found:
        return Section(0, lambda area: None, [])
    error = lambda row: off(row.sqnr_db or 0.0)
    most = max(map(error, found)) or 1.0

    def draw(area: Area):
        area.text(MARGIN, 24, f"The {len(found)} worst layers", TITLE, weight="bold")
        area.text(MARGIN, 62, "How far off their outputs are, and their bits.", SMALL, area.theme.muted)
        color = standing_out(area.theme)[-2]
        for i, row in enumerate(found):
            y = 108 + 42 * i
            area.text(MARGIN, y, fitting(place_of(row), 400, SMALL), SMALL)
            area.box(MARGIN + 380, y - 12, max(2.0, 170 * error(row) / most), 24, color)
            area.text(MARGIN + 640, y, percent(error(row)), SMALL, ha="right")
            area.text(MARGIN + 765, y, f"{row.sqnr_db:.1f} dB", SMALL, ha="right")
            area.text(MARGIN + INSIDE, y, precision(row), SMALL, area.theme.muted, ha="right")

    words = ["The worst layers:", *(f"{place_of(row)}: {row.sqnr_db:.1f} dB" for row in found)]
    return Section(108 + 42 * len(found), draw, words)


def amount(nbytes: float) -> str:
    """Bytes in GB or MB of a thousand, as disks and ComfyUI's file lists have them."""
    return in_units(nbytes)[0]


def in_units(*amounts: float) -> list[str]:
    """Numbers of bytes in the unit of the largest, GB or MB of a thousand, which the last one names."""
    scale, unit = (1e9, "GB") if max(amounts) >= 1e9 else (1e6, "MB")
    texts = [f"{amount / scale:.1f}" for amount in amounts]
    return [*texts[:-1], f"{texts[-1]} {unit}"]


def percent(part: float) -> str:
    """A share, never rounded to nothing or to all."""
    if 0 < part < 0.001:
        return "below 0.1 %"
    return f"{100 * part:.1f} %" if part < 0.999 or part == 1 else f"{100 * part:.2f} %"
