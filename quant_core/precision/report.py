"""What an allocation chose, as text."""

from ..run.report import wrapped
from .allocate import Allocated
from .budget import decibel


def allocation_text(done: Allocated, title: str) -> str:
    """Summary and table."""
    return "\n".join([title, *wrapped("\n".join(summary_lines(done))), "", *table_lines(done)])


def summary_lines(done: Allocated) -> list[str]:
    """The budget and what it came to, against one entry for all layers; lines that fit a node."""
    budget, chosen = done.budget, done.allocation
    layers = [s for s in done.table if not s.fixed]
    base = sum(s.weights for s in layers)
    line = lambda name, a: (
        f"  {name:16}  {budget.short(a.reached):>9}  {_db(a.noise / len(layers)):>9}  {a.cost / base:6.2f}"
    )
    lines = [
        f"Asked for: {budget.text()}; reached: {budget.text(chosen.reached)}",
        f"  {'':16}  {'budget':>9}  {'mean dB':>9}  {'cost':>6}",
        line("the choice", chosen),
        *(line(f"all {name}", a) for name, a in done.uniforms.items()),
        "  (dB: signal over error, more is better. cost: time of a product",
        "  by a rule of thumb, int4 1, int8 2, 16 bit 4)",
    ]
    if fixed := len(done.table) - len(layers):
        lines.append(
            f"{fixed} weight-only layers are outside of the menu; a memory budget pays for them and for "
            f"{done.held / 1e6:.1f} MB more."
        )
    return lines


def table_lines(done: Allocated) -> list[str]:
    """What each layer takes, in the order of the forward pass, then its error at each entry."""
    layers = [s for s in done.table if not s.fixed]
    lines = [f"{'takes':>16}  {'dB':>9}  layer"]
    for s in layers:
        entry = done.allocation.layers[s.name]
        lines.append(f"{entry:>16}  {_db(s.options[entry].noise):>9}  {s.name}")
    lines += ["", "Error of each layer at each entry of the menu:"]
    for s in layers:
        shown = ", ".join(f"{name} {_db(option.noise)}" for name, option in s.options.items())
        lines.append(f"{s.name} ({s.out_features} x {s.in_features}): {shown}")
    return lines


def _db(noise: float) -> str:
    return "exact" if noise <= 0 else f"{decibel(noise):.2f} dB"
