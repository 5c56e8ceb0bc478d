"""An ablation as a picture."""

from collections.abc import Sequence
from pathlib import Path

from ...charts.sheet import Area, Section, fitting, points, save
from ...charts.style import CATEGORIES, DARK, MARGIN, SMALL, TITLE, Theme
from ...charts.summary import headline
from ..judge import over_seeds
from .table import base_of, by_factor, ordered

MOST = 24  # rows with an interval of their own, the best
SCATTER, LINE = 520, 40


def plot(path: Path, rows: list[dict], base: str, theme: Theme = DARK):
    """Writes the picture as a PNG. base: name of the row that pictures are compared with. Raises ImportError
    without matplotlib."""
    save(path, sections(rows, base), theme)


def sections(rows: list[dict], base: str) -> list[Section]:
    """Paired differences of pictures with their intervals, coherent SQNR against cost, and the mean of each
    level of each factor."""
    best = max(rows, key=lambda row: row["coherent_db"])
    said = f"{len(rows)} rows; best coherent SQNR {best['coherent_db']:.1f} dB: {best['name']}."
    parts = (headline("What each choice brings", said), _intervals(rows, base), _costs(rows), _factors(rows))
    return [part for part in parts if part is not None]


def _intervals(rows, base) -> Section | None:
    figures = base_of(rows, base)
    sampled = [row for row in ordered(rows, [base]) if "each_db" in row and row["name"] != base][:MOST]
    if figures is None or not sampled:
        return None
    found = [over_seeds(figures, row["each_db"])[0] for row in sampled]

    def draw(area: Area):
        area.text(MARGIN, 24, "Picture by picture", TITLE, weight="bold")
        gloss = fitting(f"Median gain and its interval, dB over {base}.", 900, SMALL)
        area.text(MARGIN, 62, gloss, SMALL, area.theme.muted)
        axes = area.plot(430, 90, MARGIN, 60)
        for i, (row, gain) in enumerate(zip(sampled, found, strict=True)):
            color = CATEGORIES[_kind(row)]
            axes.plot([gain.low, gain.high], [i, i], color=color, linewidth=5)
            axes.plot([gain.median], [i], "o", color=color, markersize=11)
            y = 90 + LINE * (i + 0.5)
            area.text(MARGIN, y, fitting(row["name"], 390, SMALL), SMALL)
        axes.set_ylim(len(sampled) - 0.5, -0.5)
        axes.set_yticks([])
        axes.axvline(0, color=area.theme.muted, linewidth=2)
        axes.set_xlabel("dB", fontsize=points(SMALL), color=area.theme.muted)

    words = [f"{row['name']}: {gain}" for row, gain in zip(sampled, found, strict=True)]
    return Section(150 + LINE * len(sampled), draw, words)


KINDS_OF_ROWS = ("untrained", "trained", "other methods")


def _kind(row) -> int:
    """Its place in KINDS_OF_ROWS."""
    return 0 if row["levels"] else 1 if "trained" in row["name"] else 2


def _costs(rows) -> Section:
    def draw(area: Area):
        area.text(MARGIN, 24, "Error against arithmetic", TITLE, weight="bold")
        gloss = "Coherent SQNR of predictions, dB."
        area.text(MARGIN, 62, gloss, SMALL, area.theme.muted)
        axes = area.plot(96, 92, MARGIN, 110)
        for kind, name in enumerate(KINDS_OF_ROWS):
            mine = [row for row in rows if _kind(row) == kind]
            at = [(100 * row["cost"], row["coherent_db"]) for row in mine]
            if at:
                axes.plot(*zip(*at, strict=True), "o", color=CATEGORIES[kind], markersize=9)
            area.box(MARGIN + 300 * kind, area.height - 41, 22, 22, CATEGORIES[kind])
            area.text(MARGIN + 300 * kind + 32, area.height - 30, name, SMALL)
        axes.set_xlabel(
            "multiply-adds beside the products, %", fontsize=points(SMALL), color=area.theme.muted
        )

    return Section(SCATTER, draw)


def _factors(rows) -> Section | None:
    means: Sequence[tuple[str, float]] = [
        (f"{factor} {level}", mean)
        for factor, levels in by_factor(rows).items()
        for level, (mean, _) in levels.items()
    ]
    if not means:
        return None
    low, high = min(mean for _, mean in means) - 0.5, max(mean for _, mean in means)

    def draw(area: Area):
        area.text(MARGIN, 24, "The choices", TITLE, weight="bold")
        gloss = "Mean coherent SQNR of the factorial; bars start 0.5 dB below the least."
        area.text(MARGIN, 62, gloss, SMALL, area.theme.muted)
        for i, (name, mean) in enumerate(means):
            y = 108 + LINE * i
            area.text(MARGIN, y, fitting(name, 320, SMALL), SMALL)
            area.box(MARGIN + 330, y - 12, 440 * (mean - low) / (high - low), 24, CATEGORIES[0])
            area.text(MARGIN + 904, y, f"{mean:.2f} dB", SMALL, ha="right")

    return Section(110 + LINE * len(means), draw, [f"{name}: {mean:.2f} dB" for name, mean in means])
