"""What quantization cost, layer by layer and of the whole model, as text and as JSON."""

import re
import statistics
from collections.abc import Mapping
from math import prod

from ...kernels.operator.errors import MESSAGE, plain, shortened
from ..families import by_name
from ..formats.nibble import PackFile
from ..formats.opened import Opened
from ..layer.memory import layer_bytes
from ..layer.row import Row


def bits_per_weight(rows) -> float:
    """Of the quantized layers, all side data counted."""
    rows = [r for r in rows if r.quantized]
    return 8 * sum(r.nbytes for r in rows) / max(1, sum(r.weights for r in rows))


FOUR_BITS = 4 + 16 / 64
MOST = 10  # groups of left-overs that a report names
FAR_BELOW = 12.0  # dB below the median layer
ENOUGH = 6  # layers that make a median
STORAGE = (
    "  (fp32 and bf16: 4 and 2 bytes a value. 4-bit: 4.25 bits a quantized weight, 64 codes sharing a "
    "16-bit scale, and 2 bytes a value of "
    "the rest. Ours: codes, scales, smoothing, low rank and biases.)"
)


def storage(what: str, nbytes: int, weights: int, rest: int = 0) -> str:
    """E.g. "Blocks, 5.1 MB: 15.2x smaller than fp32, 7.6x than bf16, 2.0x than 4-bit with scales"; STORAGE
    says what that means.

    weights: of the layers to quantize, also of those left in 16 bit; rest: other values.
    """
    four = weights * FOUR_BITS / 8 + 2 * rest
    fp32 = 4 * (weights + rest)
    return (
        f"{what}, {nbytes / 1e6:.1f} MB: {fp32 / nbytes:.1f}x smaller than fp32, {fp32 / 2 / nbytes:.1f}x "
        "than bf16, "
        f"{four / nbytes:.2f}x than 4-bit with scales"
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
    """E.g. "24.1 % of the weights are quantized, 53.3 of 64.4 GB remain". shapes: {key: shape} of the whole
    model, at 16 bit if not quantized."""
    done = [r for r in rows if r.quantized]
    total, weights = sum(map(prod, shapes.values())), sum(r.weights for r in done)
    remain = 2 * (total - weights) + sum(r.nbytes for r in done)
    scale, unit = (1e9, "GB") if total > 5e8 else (1e6, "MB")
    return (
        f"{100 * weights / max(1, total):.1f} % of the weights are quantized, {remain / scale:.1f} of "
        f"{2 * total / scale:.1f} {unit} remain"
    )


def left_overs(rows, shapes: Mapping[str, tuple[int, ...]] | None = None) -> list[str]:
    """What stays in 16 bit, layers that differ by their number alone in one line: what was planned, then the
    biggest of the rest."""
    groups: dict = {}
    total = sum(map(prod, (shapes or {}).values()))
    for row in rows:
        if not row.quantized:
            groups.setdefault(
                (re.sub(r"(?<![^.])\d+(?![^.])", "N", row.name), row.note, bool(row.block)), []
            ).append(row)
    size = lambda group: sum(r.weights for r in group)
    share = lambda weights: f", {100 * weights / total:.1f} % of the weights" if total else ""
    ordered = sorted(groups.items(), key=lambda item: (not item[0][2], -size(item[1])))
    named = sum(planned for _, _, planned in groups) + MOST
    lines = []
    for (pattern, note, _), group in ordered[:named]:
        what = group[0].name if len(group) == 1 else f"{len(group)} x {pattern}"
        lines.append(
            f"Left in 16 bit: {shortened(plain(what))} "
            f"({shortened(plain(note), MESSAGE)}){share(size(group))}"
        )
    if rest := [row for _, group in ordered[named:] for row in group]:
        lines.append(f"Left in 16 bit: {len(rest)} more{share(size(rest))}")
    return lines


def quantization_text(
    rows, title: str, notes=(), paths=None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> str:
    """A summary and a table, worst layers first. paths: {layer: the kernels it runs on}, of
    `kernels.paths_of`. shapes: as in `whole`."""
    done = [r for r in rows if r.quantized]
    planned = [r for r in rows if r.quantized or r.block]
    before, after = 2 * sum(r.weights for r in done), sum(r.nbytes for r in done)
    lines = [title] if shapes is None else [title, whole(rows, shapes)]
    lines += [
        f"{len(done)} layers: {before / 2**20:.1f} MiB at 16 bit -> {after / 2**20:.1f} MiB, "
        f"{bits_per_weight(rows):.2f} bits a weight with all side data",
    ]
    if done:
        held = after + 2 * sum(r.weights for r in planned if not r.quantized)
        lines += [storage("Blocks", held, sum(r.weights for r in planned)), STORAGE]
    summary = sqnr_summary(rows)
    if summary["mean"] is None:
        lines.append("Layer errors were not measured: no calibration was connected.")
    else:
        lines.append(
            f"Layer SQNR on held-out tokens: mean {summary['mean']:.1f} dB, worst {summary['min']:.1f} dB"
        )
    lines += left_overs(rows, shapes)
    lines += list(notes)
    lines.append("")
    names = {r.name: shortened(plain(r.name)) for r in done}
    width = max(map(len, names.values()), default=4)
    lines.append(f"{'layer':{width}}  {'N x K':>13}  {'SQNR dB':>7}  {'bits':>5}  {'seconds':>7}  what")
    for r in sorted(done, key=lambda r: (r.sqnr_db is None, r.sqnr_db or 0)):
        sqnr = "      -" if r.sqnr_db is None else f"{r.sqnr_db:7.2f}"
        shape = f"{r.out_features} x {r.in_features}"
        chosen = plain("; ".join(f"{k} {v}" for k, v in r.choices.items()))
        lines.append(
            (
                f"{names[r.name]:{width}}  {shape:>13}  {sqnr}  {8 * r.nbytes / r.weights:5.2f}  "
                f"{r.seconds:7.2f}  {plain(r.what)}"
            )
            + f" ({chosen})" * bool(chosen)
            + (f", {paths[r.name]}" if paths and r.name in paths else "")
        )
    return "\n".join(lines)


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
