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
from ..run.source import Remembered, Weights
from ..store.own_json import field
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

    A table of the same `settings` in `path` is gone on with, but for layers whose weights have changed since;
    one of others stays, and this one goes beside it. source: as in `quantize_layers`. Layers whose width no
    kernel takes are left out. calibration: one that `require_statistics` takes. Raises CalibrationError where
    no token was held out, ValueError for a damaged table, and UnfitLayer.
    """
    table, source = Table(path, settings, "sensitivities"), Remembered(source)
    known = {(row.name, made_from): row for row, made_from in table.parsed(_row)}
    layers, done = [layer for layer in layers if not not_quantizable(layer)], []
    for layer in progress(layers, len(layers)):
        made_from = source.hash_of(layer.name)
        if (row := known.get((layer.name, made_from))) is None:
            row = _measured(layer, source, calibration, config, device)
            table.add(asdict(row) | {"source": made_from})
        done.append(row)
    return done


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
