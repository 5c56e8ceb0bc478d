"""What each precision of a menu costs each layer, measured on the layer's output: the table that `allocate`
works on."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from ..calibration.file import Calibration
from ..families import Layer
from ..methods import fit_problem
from ..run.layers import not_quantizable, problem_of
from ..run.source import Weights
from ..store.progress import Progress, silent
from ..store.table import Table
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
) -> list[Measured]:
    """Measures every layer at every entry of the menu, one layer at a time, and keeps the table in `path`
    (JSON) after each.

    A table of the same `settings` in `path` is gone on with; one of others is replaced. source: as in
    `quantize_layers`. Layers whose width no kernel takes are left out. calibration: one that
    `require_statistics` takes. Raises CalibrationError where no token was held out, ValueError for a damaged
    table, and UnfitLayer.
    """
    table = Table(path, settings, "sensitivities")
    done = {row.name: row for row in table.parsed(from_json)}
    layers = [layer for layer in layers if not not_quantizable(layer)]
    for layer in progress(layers, len(layers)):
        if layer.name not in done:
            done[layer.name] = _measured(layer, source, calibration, config, device)
            table.add(asdict(done[layer.name]))
    return [done[layer.name] for layer in layers]


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
