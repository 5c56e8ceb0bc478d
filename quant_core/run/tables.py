"""A report as Markdown with tables that a node draws, and as CSV for other programs."""

import csv
import io
from collections.abc import Mapping, Sequence

from ...kernels.operator.errors import plain, shortened
from ..charts.layers import kind_of, place_of, precision, precisions, worst
from ..charts.summary import in_units, percent
from ..layer.row import Row
from .report import bits_per_weight, left_over_groups, sqnr_summary
from .sizes import sizes
from .verdict import CLOSE, verdict

HEADER = "layer,block,kind,out_features,in_features,stored,error_db,bits_per_weight,bytes,seconds,kernel,"
HEADER += "choices,note\n"
RAISED = "guard"  # in a row's choices, of what Nibble Guard has raised
LEFT = 8  # groups of what stays in 16 bit


def markdown(
    rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]], title: str, notes: Sequence[str] = ()
) -> str:
    """The verdict, sizes, the five worst layers with what to do, kinds of layer, and what stays in 16 bit.
    shapes: as in `sizes`. notes: lines at the end."""
    found = verdict(list(rows), shapes)
    lines = [f"### {_cell(title)}", f"**{found.word}.** {_cell(found.sentence)}."]
    lines += [f"- {_cell(line)}" for line in found.advice]
    lines += ["", *_figures(rows, shapes)]
    if top := worst(rows):
        lines += ["", *_table(("Worst layers", "dB", "What to do"), [_to_do(row) for row in top])]
    lines += ["", *_kinds(rows), "", *_left(rows, shapes)]
    lines += ["", "dB: signal over error of a layer's output; at 20 dB it is 10 % off, at 26 dB 5 %."]
    return "\n".join([*lines, *(f"\n{_cell(note)}" for note in notes)])


def _figures(rows, shapes) -> list[str]:
    after, before = in_units(*sizes(rows, shapes))
    total = sizes([], shapes)[1] / 2
    summary = sqnr_summary(rows)
    figures = [("Size", f"{after} of {before}"), ("Bits a weight", f"{bits_per_weight(rows):.2f}")]
    if summary["mean"] is not None:
        figures.append(("Error, mean / worst", f"{summary['mean']:.1f} / {summary['min']:.1f} dB"))
    quantized = [row for row in rows if row.quantized]
    for name, layers, weights in precisions(quantized):
        figures.append((f"{name} bit, {layers} layers", f"{percent(weights / total)} of the weights"))
    rest = 1 - sum(row.weights for row in quantized) / total
    return _table(("The whole model", ""), [*figures, ("16 bit", f"{percent(rest)} of the weights")])


def _to_do(row: Row) -> tuple[str, ...]:
    return place_of(row), f"{row.sqnr_db:.1f}", what_to_do(row)


def what_to_do(row: Row) -> str:
    """About one layer, in a few words."""
    db, bits = row.sqnr_db or 0.0, precision(row)
    if db >= CLOSE:
        return "nothing, it is close"
    if bits.startswith("8"):
        return "16 bit, by Nibble Guard"
    if RAISED in row.choices:
        return "8 or 16 bit, by Nibble Guard"
    if bits.startswith(("1 ", "2 ")):
        return "more bits: a larger budget in Nibble Allocate Bits"
    if bits.endswith("x 16"):
        return "calibrate on more samples"
    return "8 bit, by Nibble Guard"


def _kinds(rows) -> list[str]:
    """Of each kind of layer: how many, the mean and the worst error."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.quantized and row.block:
            groups.setdefault(kind_of(row), []).append(row)
    entries = []
    for kind, group in groups.items():
        summary = sqnr_summary(group)
        error = "-" if summary["mean"] is None else f"{summary['mean']:.1f} / {summary['min']:.1f}"
        entries.append((kind, str(len(group)), error))
    return _table(("Kind of layer", "Layers", "Mean / worst dB"), entries)


def _left(rows, shapes) -> list[str]:
    total = sizes([], shapes)[1] / 2
    groups = left_over_groups(rows)
    entries = [
        (what, f"{note or '-'} ({percent(sum(row.weights for row in group) / total)})")
        for what, note, group in groups[:LEFT]
    ]
    if rest := groups[LEFT:]:
        entries.append((f"{sum(len(group) for *_, group in rest)} more", "see the CSV"))
    return _table(("Left in 16 bit", "Why, share of the weights"), entries) if entries else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(_cell(cell) for cell in cells)} |"
    return [line(head), f"|{' --- |' * len(head)}", *map(line, rows)]


def _cell(text: str) -> str:
    return shortened(plain(text), 400).replace("|", "\\|").replace("<", "&lt;")


def csv_text(rows: Sequence[Row], paths: Mapping[str, str] | None = None) -> str:
    """All rows with all they say, a header first. paths: {layer: kernel}."""
    out = io.StringIO()
    out.write(HEADER)
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        bits = 8 * row.nbytes / row.weights if row.quantized else 16.0
        writer.writerow(
            [
                plain(row.name),
                plain(row.block),
                plain(kind_of(row)) if row.block else "",
                row.out_features,
                row.in_features,
                plain(row.what),
                "" if row.sqnr_db is None else f"{row.sqnr_db:.3f}",
                f"{bits:.3f}",
                row.nbytes or 2 * row.weights,
                f"{row.seconds:.2f}",
                (paths or {}).get(row.name, ""),
                plain("; ".join(f"{k} {v}" for k, v in row.choices.items())),
                plain(row.note),
            ]
        )
    return out.getvalue()
