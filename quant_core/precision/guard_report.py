"""What Nibble Guard says of its choice, and the rows of the model's report after it."""

from dataclasses import dataclass, replace

from ..layer.linear import QuantizedLayer
from ..layer.row import Row
from ..run.report import wrapped
from .budget import Unit, Upgrade, decibel
from .measured import Measured

SHOWN = 5  # units named of those that had to stay; the table of Nibble Quantize has all layers


@dataclass(frozen=True)
class Decision:
    """What was asked for and what came out. by: "quality" or "memory"; limit: in dB or in bytes; blocks: the
    unit is a block.

    units: all that were measured; chosen: those that change; layers: {layer: precision} of the layers that
    do. weight_only: the number of layers without quantized activations.
    """

    by: str
    limit: float
    blocks: bool
    allowed: tuple[str, ...]
    measured: list[Measured]
    units: list[Unit]
    chosen: dict[str, Upgrade]
    layers: dict[str, str]
    weight_only: int = 0

    @property
    def extra(self) -> int:
        """Bytes more than before."""
        return sum(o.extra for o in self.chosen.values())


def guard_text(decision: Decision, title: str, told: str = "") -> str:
    """Totals, two lines for each layer or block that changes, and what stays below what was asked for; lines
    that fit a node. told: a verdict on the result."""
    d = decision
    kind = "block" if d.blocks else "layer"
    aim = (
        f"every {kind} at {d.limit:g} dB or more, at the least extra memory"
        if d.by == "quality"
        else f"the least error at {_kib(d.limit)} more or less"
    )
    lines = [title, *told.splitlines(), f"Asked for: {aim}", f"Allowed: {', '.join(d.allowed)}"]
    if d.weight_only:
        lines.append(
            f"Not measured and left as they are: {d.weight_only} weight-only layers, whose inputs are not "
            "quantized"
        )
    if not d.measured:
        return "\n".join(wrapped("\n".join([*lines, "No layer with quantized inputs is left to raise."])))
    worst_first = sorted(d.units, key=lambda u: -u.noise / u.layers)
    lines += [*_totals(d), *_changes(d, worst_first), *_left(d, worst_first)]
    return "\n".join(wrapped("\n".join(lines)))


def _totals(d: Decision) -> list[str]:
    count = {p: list(d.layers.values()).count(p) for p in d.allowed}
    kinds = ", ".join(f"{n} to {p}" for p, n in count.items() if n)
    lines = [f"{len(d.layers)} of {len(d.measured)} measured layers raised" + (f": {kinds}" if kinds else "")]
    before = sum(m.here.nbytes for m in d.measured)
    budget = f" of {_kib(d.limit)} allowed" if d.by == "memory" else ""
    lines.append(f"Their memory: {_kib(before)} -> {_kib(before + d.extra)}, {_signed(d.extra)}{budget}")
    now = [m.here.noise for m in d.measured]
    then = [(m.at(d.layers[m.name]) if m.name in d.layers else m.here).noise for m in d.measured]
    mean = [_db(sum(noises) / len(noises)) for noises in (now, then)]
    lines += [
        f"Error on held-out tokens: mean {mean[0]} -> {mean[1]},",
        f"  worst layer {_db(max(now))} -> {_db(max(then))} (20 dB: an output 10 % off, more is better)",
    ]
    if d.layers:
        same = sum(p == "W4A8" for p in d.layers.values())
        lines.append(
            "W4A8: 4-bit weights, 8-bit inputs. Raised layers are slower on cards with INT4 tensor cores."
            + f" W4A8 costs no memory, only that: {same} of them." * bool(same)
        )
    return lines


def _changes(d: Decision, worst_first: list[Unit]) -> list[str]:
    """Two lines for each layer or block that changes, the worst first, under a heading."""
    place = {u.name: i + 1 for i, u in enumerate(worst_first)}
    changed = [u for u in worst_first if u.name in d.chosen]
    lines = ["", "What changes:"] if changed else [""]
    for u in changed:
        upgrade = d.chosen[u.name]
        kinds = {m.what for m in d.measured if u.name in (m.name, m.block) and m.name in d.layers}
        what = f"{'/'.join(sorted(kinds))} -> {upgrade.precision}"
        arrow = f"{_db(u.noise / u.layers)} -> {_db(upgrade.noise / u.layers)}"
        lines += [
            f"{u.name}: {what}, {arrow}, {_signed(upgrade.extra)}",
            f"  {_place(place[u.name], len(d.units))}; {_reason(d, u, upgrade)}",
        ]
    return lines


def _reason(d: Decision, u: Unit, upgrade: Upgrade) -> str:
    if d.by == "memory":
        share = (u.noise - upgrade.noise) / sum(m.here.noise for m in d.measured)
        return f"takes away {100 * share:.1f} % of all noise"
    text = f"below the target {d.limit:g} dB"
    if decibel(upgrade.noise / u.layers) < d.limit:
        return text + ", the nearest that the allowed precisions come"
    tried = [o for o in u.improving if o.extra < upgrade.extra]
    return text + (
        f" ({', '.join(f'{o.precision}: {_db(o.noise / u.layers)}' for o in tried)})" if tried else ""
    )


def _left(d: Decision, worst_first) -> list[str]:
    """What could not be had, and why."""
    then = lambda u: (d.chosen[u.name].noise if u.name in d.chosen else u.noise) / u.layers
    if d.by == "quality":
        lines = []
        for u in worst_first:
            if decibel(then(u)) < d.limit:
                why = (
                    f"the best of {', '.join(d.allowed)}"
                    if u.name in d.chosen
                    else "where no allowed precision measures better"
                )
                lines.append(
                    f"Below the target: {u.name} at {_db(then(u))}, {why}. Allow 16 bit to reach it."
                )
        return lines
    waiting = []
    for u in worst_first:
        now = d.chosen.get(u.name)
        better = [o for o in u.improving if o.noise < (now.noise if now else u.noise)]
        if better:
            least = min(better, key=lambda o: o.extra)
            more = least.extra - (now.extra if now else 0)
            waiting.append(
                f"{u.name} at {_db(then(u))} ({least.precision}: {_signed(more)}, "
                f"{_db(least.noise / u.layers)})"
            )
    if not waiting:
        return []
    shown = "; ".join(waiting[:SHOWN]) + (
        f"; and {len(waiting) - SHOWN} more" if len(waiting) > SHOWN else ""
    )
    return [f"Not raised further, {_kib(d.limit - d.extra)} of the budget are left: {shown}"]


def rows_after(rows: list[dict], decision: Decision, made: dict[str, QuantizedLayer | None]) -> list[dict]:
    """The rows of a model's report (JSON) with what was measured and what changed. made: the raised
    layers."""
    table = {r["name"]: Row(**r) for r in rows}
    for m in decision.measured:
        row = table.get(m.name) or Row(
            m.name, m.block, m.in_features, m.out_features, m.what, nbytes=m.here.nbytes
        )
        row = replace(row, sqnr_db=decibel(m.here.noise))
        if precision := decision.layers.get(m.name):
            told = f"raised by Nibble Guard, was {m.what} at {_db(m.here.noise)}"
            layer = made[m.name]
            if layer is None:
                row = replace(row, what=precision, sqnr_db=None, nbytes=0, choices={}, note=told)
            else:
                option = m.at(precision)
                row = replace(
                    row,
                    what=layer.spec.describe(),
                    sqnr_db=decibel(option.noise),
                    nbytes=option.nbytes,
                    choices=row.choices | {"guard": told},
                )
        table[m.name] = row
    return [r.to_json() for r in table.values()]


def _place(place: int, of: int) -> str:
    return f"worst of {of}" if place == 1 else f"no. {place} of {of} from the worst"


def _db(noise: float) -> str:
    return "exact" if noise <= 0 else f"{decibel(noise):.1f} dB"


def _kib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if abs(nbytes) >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def _signed(nbytes: int) -> str:
    return ("+" if nbytes >= 0 else "") + _kib(nbytes)
