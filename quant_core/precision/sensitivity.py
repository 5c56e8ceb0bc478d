"""What each precision of a menu costs each layer, measured on the layer's output: the table that `allocate`
works on."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..calibration.file import Calibration
from ..families import Layer
from ..methods import fit_problem
from ..run.layers import fitting_bytes, not_quantizable, problem_of
from ..run.source import Remembered, Weights
from ..store.own_json import field
from ..store.progress import Progress, silent
from ..store.table import Table
from ..store.workers import HERE, Workers
from .measured import Measured, from_json, option_of, require_tokens
from .menu import MIXED, MixedConfig, variants


def sensitivity(
    layers: Iterable[Layer],
    source: Weights,
    calibration: Calibration,
    config: MixedConfig,
    path: Path,
    settings: dict,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
    workers: Workers = HERE,
) -> list[Measured]:
    """Measures every layer at every entry of the menu, and keeps the table in `path` (JSON) after each.

    A table of the same `settings` in `path` is gone on with, but for layers whose weights have changed since;
    one of others stays, and this one goes beside it. source: as in `quantize_layers`; workers: who measures.
    Layers whose width no kernel takes are left out. calibration: one that `require_statistics` takes. Raises
    CalibrationError where no token was held out, ValueError for a damaged table, and UnfitLayer.
    """
    table = Table(path, settings, "sensitivities")
    known = {(row.name, made_from): row for row, made_from in table.parsed(_row)}
    layers = [layer for layer in layers if not not_quantizable(layer)]
    unit = OneLayer(source, calibration, config, device, frozenset(known))

    def kept():  # before an interrupt can come
        for name, made_from, row in workers.map(unit, layers, lambda layer: layer.name, fitting_bytes):
            if row is not None:
                table.add(asdict(row) | {"source": made_from})
            yield name, known[name, made_from] if row is None else row

    done = dict(progress(kept(), len(layers)))
    return [done[layer.name] for layer in layers]


@dataclass(frozen=True)
class OneLayer:
    """Measures a layer: (its name, the hash of its weights, the numbers; None where `known` has that name and
    hash)."""

    source: Weights
    calibration: Calibration
    config: MixedConfig
    device: str | torch.device
    known: frozenset[tuple[str, str]]

    def __call__(self, layer: Layer) -> tuple[str, str, Measured | None]:
        source = Remembered(self.source)
        made_from = source.hash_of(layer.name)
        if (layer.name, made_from) in self.known:
            return layer.name, made_from, None
        return layer.name, made_from, _measured(layer, source, self.calibration, self.config, self.device)


def _row(row: dict) -> tuple[Measured, str]:
    """(what was measured, hash of the weights it was measured on)."""
    return from_json({k: v for k, v in row.items() if k != "source"}), field(row, "source", str)


def _measured(layer, source, calibration, config, device):
    make = lambda: problem_of(layer, source, calibration, device)
    problem = problem_of(layer, source, calibration, device, second_moments=False)
    here = Measured(layer.name, layer.block, layer.in_features, layer.out_features, layer.weight_only)
    if layer.weight_only:
        fitted = fit_problem(make(), MIXED, config).layer
        here.options["W4A16"] = option_of(problem, fitted)
        return here
    require_tokens(problem, calibration)
    for entry, made in variants(make, config):
        here.options[entry.name] = option_of(problem, made)
    return here
