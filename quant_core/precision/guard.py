"""What a quantized layer can be raised to, and what that brings on held-out tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..calibration.file import Calibration
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..layer.precisions import PRECISIONS, higher, w4a8, w8a8
from ..layer.problem import Problem
from ..run.layers import fitting_bytes, problem_of, require_statistics
from ..run.source import Weights
from ..store.workers import HERE, Workers
from .budget import Unit, Upgrade
from .measured import Measured, option_of, require_tokens


def raised(
    problem: Problem, quantized: QuantizedLayer, allowed: Iterable[str] = PRECISIONS
) -> Iterator[tuple[str, QuantizedLayer | None]]:
    """Yields what the layer can be raised to among `allowed`, (precision, layer or None at 16 bit), one at a
    time in memory. `quantized` is on the device of the problem."""
    for precision in higher(quantized.spec):
        if precision in allowed:
            make = {"W4A8": lambda: w4a8(quantized), "W8A8": lambda: w8a8(problem, quantized)}
            yield precision, make[precision]() if precision in make else None


def measure(
    layers: Iterable[Layer],
    quantized: dict[str, QuantizedLayer],
    source: Weights,
    calibration: Calibration,
    allowed: Iterable[str] = PRECISIONS,
    device: str | torch.device = "cpu",
    workers: Workers = HERE,
) -> Iterator[Measured]:
    """Yields the numbers of each of the layers, all in `quantized` with something `higher`, in any order;
    keeps no tensor from one to the next.

    source: of the weights in full precision; workers: who measures. Raises what `require_statistics` does,
    CalibrationError where the calibration holds no token to judge by, and UnfitLayer.
    """
    layers = list(layers)
    require_statistics(layers, calibration)
    unit = OneLayer(source, calibration, tuple(allowed), device)
    pairs = [(layer, quantized[layer.name]) for layer in layers]
    return workers.map(unit, pairs, lambda pair: pair[0].name, lambda pair: fitting_bytes(pair[0]))


@dataclass(frozen=True)
class OneLayer:
    """Measures a layer that is quantized already."""

    source: Weights
    calibration: Calibration
    allowed: tuple[str, ...]
    device: str | torch.device

    def __call__(self, pair: tuple[Layer, QuantizedLayer]) -> Measured:
        layer, quantized = pair
        problem = problem_of(layer, self.source, self.calibration, self.device, second_moments=False)
        require_tokens(problem, self.calibration)
        here = quantized.to(self.device)
        options = {name: option_of(problem, made) for name, made in raised(problem, here, self.allowed)}
        now = (here.spec.precision, option_of(problem, here))
        return Measured(
            layer.name, layer.block, layer.in_features, layer.out_features, options=options, now=now
        )


def as_units(measured: list[Measured], blocks: bool) -> list[Unit]:
    """One Unit a layer, or one a block: then all its layers take a precision together, but for those that
    would measure worse."""
    groups: dict[str, list[Measured]] = {}
    for m in measured:
        groups.setdefault(m.block if blocks else m.name, []).append(m)
    units = []
    for name, group in groups.items():
        nbytes, noise = sum(m.here.nbytes for m in group), sum(m.here.noise for m in group)
        upgrades = []
        for precision in PRECISIONS:
            if any(precision in m.options for m in group):
                after = [m.at(precision) for m in group]
                extra = sum(o.nbytes for o in after) - nbytes
                upgrades.append(Upgrade(precision, extra, sum(o.noise for o in after)))
        units.append(Unit(name, noise, tuple(upgrades), len(group)))
    return units


def by_layer(measured: list[Measured], chosen: dict[str, Upgrade], blocks: bool) -> dict[str, str]:
    """{layer: precision} of the layers that change, from what was chosen for the units."""
    out = {}
    for m in measured:
        upgrade = chosen.get(m.block if blocks else m.name)
        if upgrade is not None and m.at(upgrade.precision) != m.here:
            out[m.name] = upgrade.precision
    return out
