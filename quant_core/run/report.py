"""What quantization cost, layer by layer and of the whole model, as text and as JSON."""

import re
import statistics
import textwrap
from collections.abc import Mapping
from math import prod

from ...kernels.operator.errors import MESSAGE, plain, shortened
from ..charts.layers import worst
from ..charts.summary import in_units
from ..families import by_name
from ..formats.nibble import PackFile
from ..formats.opened import Opened
from ..layer.memory import layer_bytes
from ..layer.row import Row
from .sizes import sizes
from .verdict import verdict


def bits_per_weight(rows) -> float:
    """Of the quantized layers, all side data counted."""
    rows = [r for r in rows if r.quantized]
    return 8 * sum(r.nbytes for r in rows) / max(1, sum(r.weights for r in rows))


FOUR_BITS = 4 + 16 / 64
MOST = 10  # groups of left-overs that a report names
FAR_BELOW = 12.0  # dB below the median layer
ENOUGH = 6  # layers that make a median
LINE = 64  # letters that a node of 450 pixels shows in a line
WORST = 5


def storage(what: str, nbytes: int, weights: int, rest: int = 0) -> str:
    """E.g. "Blocks: 5.1 MB (in fp32 77.5, in bf16 38.8, in plain 4 bit 10.3)". Plain 4 bit is 4.25 bits a
    quantized weight, 64 codes sharing a 16-bit scale, and 2 bytes a value of the rest.

    weights: of the layers to quantize, also of those left in 16 bit; rest: other values.
    """
    bf16 = 2 * (weights + rest)
    scale, unit = (1e9, "GB") if bf16 >= 1e9 else (1e6, "MB")
    size = lambda n: f"{n / scale:.1f}"
    return (
        f"{what}: {size(nbytes)} {unit} (in fp32 {size(2 * bf16)}, in bf16 {size(bf16)}, in plain 4 bit "
        f"{size(weights * FOUR_BITS / 8 + 2 * rest)})"
    )


def file_storage(pack: PackFile) -> str:
    """`storage` of a whole file as it lies on the disk, header included."""
    layers = {row["name"] for row in pack.report if row["block"]} | set(pack.specs)
    shapes = pack.logical_shapes()
    weights = sum(
        prod(s) for k, s in shapes.items() if k.endswith(".weight") and k.removesuffix(".weight") in layers
    )
    trits = f", {len(pack.base3)} ternary layers in base 3" * bool(pack.base3)
    return storage(
        f"Whole file{trits}", pack.path.stat().st_size, weights, sum(map(prod, shapes.values())) - weights
    )


def as_report(model: Opened) -> list[dict]:
    """Rows for a file whose format has no report: what each layer is, without errors."""
    blocks = {layer.name: layer.block for layer in by_name(model.family).layers(model.logical_shapes())}
    row = lambda name, s: Row(
        name, blocks.get(name, ""), s.in_features, s.out_features, s.describe(), nbytes=layer_bytes(s)
    )
    return [row(name, spec).to_json() for name, spec in model.specs.items()]


def sqnr_summary(rows) -> dict:
    """{"mean", "min"} in dB over the layers whose error was measured; None without calibration."""
    measured = [r.sqnr_db for r in rows if r.sqnr_db is not None]
    if not measured:
        return {"mean": None, "min": None}
    return {"mean": sum(measured) / len(measured), "min": min(measured)}


def whole(rows, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """E.g. "24.1 % of the weights are quantized, 53.3 of 64.4 GB remain". shapes: as in `sizes`."""
    remain, before = sizes(rows, shapes)
    weights = sum(r.weights for r in rows if r.quantized)
    after, at_first = in_units(remain, before)
    share = 100 * 2 * weights / max(1, before)
    return f"{share:.1f} % of the weights are quantized, {after} of {at_first} remain"


def left_over_groups(rows) -> list[tuple[str, str, list[Row]]]:
    """(names, why, rows) of what stays in 16 bit, layers that differ by their number alone together: what was
    planned first, then the biggest."""
    groups: dict = {}
    for row in rows:
        if not row.quantized:
            groups.setdefault(
                (re.sub(r"(?<![^.])\d+(?![^.])", "N", row.name), row.note, bool(row.block)), []
            ).append(row)
    size = lambda group: sum(r.weights for r in group)
    ordered = sorted(groups.items(), key=lambda item: (not item[0][2], -size(item[1])))
    names = lambda pattern, group: group[0].name if len(group) == 1 else f"{len(group)} x {pattern}"
    return [(names(pattern, group), note, group) for (pattern, note, _), group in ordered]


def left_overs(rows, shapes: Mapping[str, tuple[int, ...]] | None = None) -> list[str]:
    """What stays in 16 bit, a line for each of `left_over_groups`: all that was planned, and the biggest of
    the rest."""
    total = sum(map(prod, (shapes or {}).values()))

    def share(group):
        return f", {100 * sum(r.weights for r in group) / total:.1f} % of the weights" if total else ""

    groups = left_over_groups(rows)
    named = sum(bool(group[0].block) for *_, group in groups) + MOST
    lines = [
        f"Left in 16 bit: {shortened(plain(what))} ({shortened(plain(note), MESSAGE)}){share(group)}"
        for what, note, group in groups[:named]
    ]
    if rest := [row for *_, group in groups[named:] for row in group]:
        lines.append(f"Left in 16 bit: {len(rest)} more{share(rest)}")
    return lines


def quantization_text(
    rows, title: str, notes=(), paths=None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> str:
    """A verdict, a summary, what stays in 16 bit, and tables, worst layers first; lines that fit a node but
    for the last table. paths: {layer: the kernels it runs on}, of `kernels.paths_of`. shapes: as in
    `sizes`."""
    lines = []
    if shapes is not None:
        lines += [verdict(rows, shapes).text, "", whole(rows, shapes)]
    lines += [*_summary(rows), *_worst(rows), "", *left_overs(rows, shapes), *notes]
    done = sorted((r for r in rows if r.quantized), key=lambda r: (r.sqnr_db is None, r.sqnr_db or 0))
    names = {r.name: shortened(plain(r.name)) for r in done}
    table = ["", f"{'dB':>6}  {'bits':>5}  {'N x K':>13}  layer"]
    details = ["", "How each layer is stored, what was chosen, and what computes it:"]
    for r in done:
        db = "-" if r.sqnr_db is None else f"{r.sqnr_db:.2f}"
        shape = f"{r.out_features} x {r.in_features}"
        table.append(f"{db:>6}  {8 * r.nbytes / r.weights:5.2f}  {shape:>13}  {names[r.name]}")
        chosen = plain("; ".join(f"{k} {v}" for k, v in r.choices.items()))
        details.append(
            f"{names[r.name]}: {plain(r.what)}"
            + f" ({chosen})" * bool(chosen)
            + (f", {paths[r.name]}" if paths and r.name in paths else "")
            + f", {r.seconds:.2f} s" * (r.seconds > 0)
        )
    return "\n".join([title, *wrapped("\n".join(lines)), *table, *details * bool(done)])


def wrapped(text: str, width: int = LINE) -> list[str]:
    """Lines of at most `width` letters, the rest of a line indented by two more than its beginning."""
    out = []
    for line in text.splitlines():
        if len(line) <= width:
            out.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        out += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return out


def _summary(rows) -> list[str]:
    done = [r for r in rows if r.quantized]
    planned = [r for r in rows if r.quantized or r.block]
    before, after = 2 * sum(r.weights for r in done), sum(r.nbytes for r in done)
    first, second = in_units(before, after)
    lines = [
        f"{len(done)} layers: {first} in 16 bit, now {second}; {bits_per_weight(rows):.2f} bits a weight, "
        "scales and all other side data counted"
    ]
    if done:
        held = after + 2 * sum(r.weights for r in planned if not r.quantized)
        lines.append(storage("Blocks", held, sum(r.weights for r in planned)))
    summary = sqnr_summary(rows)
    if summary["mean"] is None:
        return [*lines, "Layer errors were not measured: no calibration was connected."]
    return [
        *lines,
        f"Layer error on held-out tokens: mean {summary['mean']:.1f} dB, worst {summary['min']:.1f} dB",
        "  (dB: signal over error, more is better; 20 dB: 10 % off)",
    ]


def _worst(rows) -> list[str]:
    """The layers to look at first; none where there are not many more."""
    found = worst(rows, 2 * WORST + 1)
    if len(found) <= 2 * WORST:
        return []
    return ["", f"The {WORST} worst layers:"] + [
        f"  {r.sqnr_db:6.2f} dB  {shortened(plain(r.name))}" for r in found[:WORST]
    ]


def sensitive(rows) -> dict[str, str]:
    """{layer: why} of report rows whose measured SQNR lies far below the median: what no rule about names
    could know."""
    measured = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    if len(measured) < ENOUGH:
        return {}
    limit = statistics.median(measured) - FAR_BELOW
    low = {row.name: row.sqnr_db for row in rows if row.sqnr_db is not None and row.sqnr_db < limit}
    return {
        name: f"16 bit: {db:.1f} dB, the median layer has {limit + FAR_BELOW:.1f}" for name, db in low.items()
    }
