"""Where the layers of a model stand in a drawing: blocks from left to right, kinds of layer from top to
bottom."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..layer.row import Row

PANELS = 3  # groups of blocks with a panel of their own; more share one
KINDS = 24  # of a panel; those with the fewest layers share the last line
OTHERS = "others"
IN_16_BIT = "16 bit"


@dataclass(frozen=True)
class Panel:
    """Blocks of one kind. numbers: of the blocks, as text, in the order of the model; kinds: names of their
    layers. cells: {(kind, block's place): row}."""

    title: str
    numbers: list[str]
    kinds: list[str]
    cells: dict[tuple[int, int], Row]


def panels(rows: Iterable[Row]) -> list[Panel]:
    """Of rows of a report; those outside of blocks, which were never to be quantized, have no place."""
    planned = [row for row in rows if row.block]
    stems: dict[str, list[Row]] = {}
    for row in planned:
        stems.setdefault(re.sub(r"\d+", "N", row.block), []).append(row)
    if len(stems) > PANELS:
        return [_panel("blocks, in the model's order", planned, lambda i, block: str(i))]
    number = lambda i, block: (re.findall(r"\d+", block) or [str(i)])[-1]
    return [_panel(_spoken(stem), group, number) for stem, group in stems.items()]


def _panel(title, rows, number) -> Panel:
    blocks = list(dict.fromkeys(row.block for row in rows))
    counts = Counter(kind_of(row) for row in rows)
    kinds = list(counts)
    if len(kinds) > KINDS:
        common = {kind for kind, _ in counts.most_common(KINDS - 1)}
        kinds = [kind for kind in kinds if kind in common] + [OTHERS]
    place = {block: i for i, block in enumerate(blocks)}
    cells: dict[tuple[int, int], Row] = {}
    for row in rows:
        kind = kind_of(row)
        at = (kinds.index(kind if kind in kinds else OTHERS), place[row.block])
        if at not in cells or worse(row, cells[at]):
            cells[at] = row
    return Panel(
        title,
        [number(i, block) for i, block in enumerate(blocks)],
        kinds,
        cells,
    )


def worse(row: Row, other: Row) -> bool:
    """Whether a layer's measured error is the larger one; not measured counts as none."""
    best = float("inf")
    return (best if row.sqnr_db is None else row.sqnr_db) < (best if other.sqnr_db is None else other.sqnr_db)


def kind_of(row: Row) -> str:
    """The layer's name within its block."""
    return row.name.removeprefix(f"{row.block}.")


def place_of(row: Row) -> str:
    """A layer in few letters, e.g. "double 5, img_mlp.2"."""
    if not row.block:
        return row.name
    number = (re.findall(r"\d+", row.block) or [""])[-1]
    stem = _spoken(re.sub(r"\d+", "N", row.block)).removesuffix("blocks").strip() or "block"
    return f"{stem} {number}, {kind_of(row)}"


def _spoken(stem: str) -> str:
    return re.sub(r"[._]+", " ", re.sub(r"(^|\.)N(?=\.|$)", "", stem)).strip() or "blocks"


def precision(row: Row) -> str:
    """What a layer is in: "4 x 8" is 4-bit weights times 8-bit inputs, or "16 bit"."""
    found = re.match(r"W(\d+)A(\d+)\b", row.what)
    return f"{found[1]} x {found[2]}" if found and row.quantized else IN_16_BIT


def precisions(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """(precision, layers, weights) of the rows, fewest bits first, 16 bit last."""
    layers: Counter = Counter()
    weights: Counter = Counter()
    for row in rows:
        layers[precision(row)] += 1
        weights[precision(row)] += row.weights
    bits = lambda name: (name == IN_16_BIT, [int(n) for n in re.findall(r"\d+", name)])
    return [(name, layers[name], weights[name]) for name in sorted(layers, key=bits)]


def off(db: float) -> float:
    """How far off an output of this SQNR is, the root of its mean square error against its own: 0.1 at 20
    dB."""
    return 10 ** (-db / 20)


def worst(rows: Iterable[Row], count: int = 5) -> list[Row]:
    """The quantized layers with the largest measured errors, the worst first."""
    found = [row for row in rows if row.quantized and row.sqnr_db is not None]
    return sorted(found, key=lambda row: row.sqnr_db or 0.0)[:count]
