"""The picture of an allocation: bits and error of each layer, and what other budgets would have brought."""

from pathlib import Path

import torch

from ..charts.heatmap import bits_map, error_map
from ..charts.sheet import Area, Section, drawn, points, save
from ..charts.style import CATEGORIES, DARK, MARGIN, SMALL, TITLE, Theme
from ..charts.summary import headline
from ..layer.row import Row
from .allocate import Allocated, Allocation
from .budget import decibel

PLOT = 380


def plot(path: Path, done: Allocated, theme: Theme = DARK):
    """Writes the picture as a PNG. Raises ImportError without matplotlib."""
    save(path, sections(done), theme)


def pixels(done: Allocated, theme: Theme = DARK) -> tuple[torch.Tensor, list[str]]:
    """(the same picture (1, H, W, 3), fp32 in [0, 1], lines for a report): see `charts.sheet.drawn`."""
    return drawn(sections(done), theme)


def sections(done: Allocated) -> list[Section]:
    """What was asked for and reached; bits and errors by block and kind; and the least error of each other
    budget."""
    mean = _mean_db(done, done.allocation)
    reached = done.budget.text(done.allocation.reached)
    said = f"Reached: {reached}. Mean error of the layers: {'none' if mean is None else f'{mean:.1f} dB'}."
    rows = [_row(s, done.allocation.layers[s.name]) for s in done.table if not s.fixed]
    return [headline(f"At most {done.budget.text()}", said), bits_map(rows), error_map(rows), _budgets(done)]


def _row(layer, entry: str) -> Row:
    option = layer.options[entry]
    weight, activation = round(option.weight_bits), round(option.activation_bits)
    row = Row(layer.name, layer.block, layer.in_features, layer.out_features, "16 bit")
    if (weight, activation) != (16, 16):
        row.what, row.nbytes, row.sqnr_db = f"W{weight}A{activation}", option.nbytes, decibel(option.noise)
    return row


def _mean_db(done: Allocated, allocation: Allocation) -> float | None:
    """Of the layers' mean noise; None where there is none."""
    noise = allocation.noise / len(allocation.layers)
    return decibel(noise) if noise > 0 else None


def _budgets(done: Allocated) -> Section:
    """Least mean error against the budget, with the choice and every entry taken by all layers. Points
    without noise, all layers in 16 bit, have no place in dB."""
    unit, across = _unit(done.budget)
    count = len(done.allocation.layers)
    curve = [(x / unit, decibel(noise / count)) for x, noise in done.curve if noise > 0]
    marks = [("the choice", "D", done.allocation)]
    marks += [(f"all layers {name}", "o", a) for name, a in done.uniforms.items()]
    marks = [(name, sign, a) for name, sign, a in marks if a.noise > 0]
    below = 72 + 36 * -(-(len(marks) + 1) // 2)

    def draw(area: Area):
        area.text(MARGIN, 24, "Other budgets", TITLE, weight="bold")
        area.text(MARGIN, 62, "Mean error in dB, higher is better.", SMALL, area.theme.muted)
        axes = area.plot(86, 92, MARGIN, below + 26)
        if curve:
            axes.step(*zip(*curve, strict=True), where="post", color=area.theme.muted, linewidth=3)
        axes.set_xlabel(across, fontsize=points(SMALL), color=area.theme.muted)
        axes.margins(0.06, 0.12)
        entries = [("least error for each budget", area.theme.muted)]
        for i, (name, sign, a) in enumerate(marks):
            color = area.theme.text if i == 0 else CATEGORIES[(i - 1) % len(CATEGORIES)]
            db = decibel(a.noise / count)
            # The choice lies on the curve: its frame is drawn over what lies there.
            axes.plot(
                a.reached / unit, db, sign, color=color, markersize=14 if i == 0 else 12, zorder=4 + (not i)
            )
            entries.append((f"{name}: {db:.1f} dB", color))
        for i, (text, color) in enumerate(entries):
            x, y = MARGIN + 452 * (i % 2), area.height - below + 66 + 36 * (i // 2)
            area.box(x, y - 11, 22, 22, color)
            area.text(x + 32, y, text, SMALL)

    return Section(PLOT + below, draw, [])


def _unit(budget):
    if budget.kind == "memory":
        return (1e9, "GB of the file") if budget.value >= 1e9 else (1e6, "MB of the file")
    if budget.kind == "speed":
        return 1, "time of the products by a rule of thumb; 1: all in int8"
    return 1, f"{budget.kind} bits on average"
