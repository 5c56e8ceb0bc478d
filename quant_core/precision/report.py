"""What an allocation chose, as text."""

from .allocate import Allocated
from .budget import decibel


def allocation_text(done: Allocated, title: str) -> str:
    """The budget, what it came to against one entry for all layers, and what each layer got, in the order of
    the forward pass."""
    budget, chosen = done.budget, done.allocation
    layers = [s for s in done.table if not s.fixed]
    db = lambda noise: "exact" if noise <= 0 else f"{decibel(noise):.2f} dB"
    base = sum(s.weights for s in layers)
    line = lambda name, a: (
        f"  {name:22}  {budget.text(a.reached):>34}  {db(a.noise / len(layers)):>9}  {a.cost / base:5.2f}"
    )
    lines = [
        f"{title}: {budget.text()}",
        f"  {'':22}  {'':>34}  {'mean noise':>9}  cost, the speed proxy (int4 1, int8 2, 16 bit 4)",
    ]
    lines.append(line("allocated", chosen))
    lines += [line(f"all {name}", a) for name, a in done.uniforms.items()]
    if fixed := len(done.table) - len(layers):
        lines.append(
            f"{fixed} weight-only layers are outside of the menu; a memory budget pays for them and for "
            f"{done.held / 1e6:.1f} MB more."
        )
    lines.append("")
    width = max(len(s.name) for s in layers)
    names = list(done.uniforms)
    lines.append(f"{'layer':{width}}  {'N x K':>13}  " + "  ".join(f"{n:>14}" for n in names) + "  takes")
    for s in layers:
        row = "  ".join(f"{db(s.options[n].noise):>14}" for n in names)
        lines.append(
            f"{s.name:{width}}  {f'{s.out_features} x {s.in_features}':>13}  {row}  {chosen.layers[s.name]}"
        )
    return "\n".join(lines)
