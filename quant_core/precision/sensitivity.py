"""What each precision of a menu costs each layer, measured on the layer's output: the table that `allocate`
works on."""

import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from dataclasses import field as member
from pathlib import Path

import torch

from ...kernels.operator.spec import LinearSpec
from ..calibration.file import Calibration
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..methods import fit_problem
from ..run.layers import not_quantizable, problem_of
from ..run.source import Remembered, Weights
from ..store.own_json import NotOurs, field
from ..store.progress import Progress, silent
from ..store.table import Table
from .guard import noise_of, require_tokens
from .menu import MIXED, MixedConfig, variants


@dataclass(frozen=True)
class Cell:
    """A layer at one precision. noise: noise-to-signal ratio of its output on held-out tokens; nbytes: with
    all side data.

    bits: of the codes, the mean over in-channels, without side data. cost: multiply-adds a token, times
    `relative_cost`.
    """

    noise: float
    nbytes: int
    activation_bits: float
    weight_bits: float
    cost: float


@dataclass(frozen=True)
class Sensitivity:
    """A layer and {entry: Cell}. fixed: weight-only, with one cell, outside of averages of bits."""

    name: str
    block: str
    in_features: int
    out_features: int
    fixed: bool = False
    cells: dict[str, Cell] = member(default_factory=dict)

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


def relative_cost(spec: LinearSpec | None) -> float:
    """Time of a multiply-add against int4's, by the peak rates of Ampere's and Ada's tensor cores (int4 4,
    int8 2, 16 bit 1).

    A proxy: the path is that of `kernels.plan.kernel_of` there, where 2-bit weights, and any with 8-bit
    activations, are int8 products. So fewer activation bits than 8 make a ternary layer no faster today.
    Memory traffic, quantizer and low rank are not in it.
    """
    if spec is None:
        return 4.0
    rate = lambda p: (
        4 if p.activation is None else (1 if p.weight.bits == 4 and p.activation.bits <= 4 else 2)
    )
    return sum(p.width * rate(p) for p in spec.parts) / spec.in_features


def sensitivity(
    layers: Iterable[Layer],
    source: Weights,
    calibration: Calibration,
    config: MixedConfig,
    path: Path,
    settings: dict,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> list[Sensitivity]:
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


def _measured(layer, source, calibration, config, device):
    make = lambda: problem_of(layer, source, calibration, device)
    problem = problem_of(layer, source, calibration, device, second_moments=False)
    here = Sensitivity(layer.name, layer.block, layer.in_features, layer.out_features, layer.weight_only)
    if layer.weight_only:
        fitted = fit_problem(make(), MIXED, config).layer
        here.cells["W4A16"] = _cell(problem, fitted)
        return here
    require_tokens(problem, calibration)
    for entry, made in variants(make, config):
        here.cells[entry.name] = _cell(problem, made)
    return here


def _cell(problem, layer: QuantizedLayer | None) -> Cell:
    macs = problem.original.numel()
    if layer is None:  # 2 bytes each, also of an fp32 original
        bias = 0 if problem.bias is None else problem.bias.numel()
        return Cell(0.0, 2 * (macs + bias), 16.0, 16.0, relative_cost(None) * macs)
    # Of weight-only layers, outside of every choice.
    noise = 0.0 if problem.tokens("report") is None else noise_of(problem, layer)
    mean = lambda bits: sum(p.width * bits(p) for p in layer.spec.parts) / layer.spec.width
    activation = mean(lambda p: 16 if p.activation is None else p.activation.bits)
    return Cell(
        noise, layer.nbytes, activation, mean(lambda p: p.weight.bits), relative_cost(layer.spec) * macs
    )


def _row(row: dict) -> tuple[Sensitivity, str | None]:
    """(what was measured, hash of the weights it was measured on; None up to 0.7)."""
    row = dict(row)
    made_from = row.pop("source", None)
    cells = {}
    for name, found in field(row, "cells", dict).items():
        cells[name] = Cell(
            **{part: field(found, part, (int, float)) for part in field(row["cells"], name, dict)}
        )
        if not all(math.isfinite(v) and v >= 0 for v in astuple(cells[name])):
            raise NotOurs(f"cells: {name}: expected numbers of 0 or more")
    for name, kind in {"name": str, "block": str, "fixed": bool}.items():
        field(row, name, kind)
    for name in ("in_features", "out_features"):
        field(row, name, int, 1)
    return Sensitivity(**row | {"cells": cells}), made_from
