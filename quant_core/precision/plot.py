"""The picture of an allocation: bits of each layer, and what error other budgets would have."""

from pathlib import Path

import numpy as np
import torch

from ..store.atomic import replacing
from .allocate import Allocated

DPI = 110


def plot(path: Path, done: Allocated):
    """Writes the picture of `figure` as a PNG. Raises ImportError without matplotlib."""
    with replacing(path) as temporary:
        figure(done).savefig(temporary, dpi=DPI, format="png")


def pixels(done: Allocated) -> torch.Tensor:
    """The same picture (H, W, 3), fp32 in [0, 1]."""
    canvas = figure(done).canvas
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).float() / 255


def figure(done: Allocated):
    """Bars of activation and weight bits by layer, above the Pareto curve of budget against mean noise.

    Points of the curve without noise, all layers in 16 bit, have no place on its logarithmic axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [s for s in done.table if not s.fixed]
    options = [s.options[done.allocation.layers[s.name]] for s in layers]
    places = range(len(layers))
    made = Figure(figsize=(max(8, 0.16 * len(layers)), 9), dpi=DPI)
    FigureCanvasAgg(made)
    bars, curve = made.subplots(2, 1)
    bars.bar([x - 0.2 for x in places], [o.activation_bits for o in options], 0.4, label="activation bits")
    bars.bar([x + 0.2 for x in places], [o.weight_bits for o in options], 0.4, label="weight bits")
    bars.set_xticks(list(places), [s.name for s in layers], rotation=90, fontsize=7)
    bars.set_ylabel("bits of the codes")
    bars.set_title(f"{done.budget.text()}: {done.budget.text(done.allocation.reached)} reached", fontsize=10)
    bars.legend()

    unit, label = _unit(done.budget)
    shown = [(x / unit, noise / len(layers)) for x, noise in done.curve if noise > 0]
    if shown:
        curve.step(*zip(*shown, strict=True), where="post", label="best for each budget")
    for name, a in done.uniforms.items():
        if a.noise > 0:
            curve.plot(a.reached / unit, a.noise / len(layers), "x", color="tab:gray")
            curve.annotate(f"all {name}", (a.reached / unit, a.noise / len(layers)), fontsize=7)
    if done.allocation.noise > 0:
        curve.plot(
            done.allocation.reached / unit,
            done.allocation.noise / len(layers),
            "o",
            color="tab:red",
            label="chosen",
        )
    curve.set_yscale("log")
    curve.set_xlabel(label)
    curve.set_ylabel("mean noise-to-signal ratio of layer outputs")
    curve.legend()
    made.tight_layout()
    return made


def _unit(budget):
    if budget.kind == "memory":
        return 1e6, "MB of the file"
    if budget.kind == "speed":
        return 1, "cost by the speed proxy, 1 with every layer at its most expensive quantized entry"
    return 1, f"{budget.kind} bits on average"
