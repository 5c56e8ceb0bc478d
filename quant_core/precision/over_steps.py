"""Errors of layers over the steps of a sampling, on the held-out tokens of a calibration, which know their
timesteps."""

import math
from collections.abc import Iterable, Iterator
from statistics import median

import torch

from ..calibration.file import Calibration
from ..charts.curves import curves
from ..charts.layers import place_of
from ..charts.sheet import Section
from ..families import Layer
from ..layer.chunks import row_chunks
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem
from ..layer.row import Row
from ..run.layers import problem_of, require_statistics
from ..run.source import Weights
from .measured import require_tokens

MOST = 12  # points of a curve
LAYERS = 32  # that are measured: the worst, and others evenly from first to last


def chosen(layers: list[Layer], rows: Iterable[Row], count: int = LAYERS, worst: int = 5) -> list[Layer]:
    """The layers to measure, in their order: those with the largest errors in `rows`, and others evenly."""
    errors = {row.name: row.sqnr_db for row in rows if row.quantized and row.sqnr_db is not None}
    first = sorted((x for x in layers if x.name in errors), key=lambda x: errors[x.name])[:worst]
    names = {layer.name for layer in first}
    rest = [layer for layer in layers if layer.name not in names]
    left = min(count - len(first), len(rest))
    names |= {rest[i * len(rest) // left].name for i in range(left)}
    return [layer for layer in layers if layer.name in names]


def over_steps(
    layers: list[Layer],
    quantized: dict[str, QuantizedLayer],
    source: Weights,
    calibration: Calibration,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Layer, list[tuple[float, float]]]]:
    """Yields each layer with its [(timestep, error in dB)]; one layer at a time is on the device.

    source: of the weights in full precision. Raises what `require_statistics` does, CalibrationError without
    held-out tokens, and UnfitLayer.
    """
    require_statistics(layers, calibration)
    for layer in layers:
        problem = problem_of(layer, source, calibration, device, second_moments=False)
        require_tokens(problem, calibration)
        yield layer, by_timestep(problem, quantized[layer.name].to(device))


def by_timestep(problem: Problem, quantized: QuantizedLayer) -> list[tuple[float, float]]:
    """[(timestep, error in dB)] on the tokens that a report is made with, from small to large timesteps, of
    more than MOST those of equal shares."""
    x = problem.tokens("report")
    assert x is not None
    assert problem.statistics is not None
    times = problem.statistics.timesteps[1::2].double()
    signal, noise = (torch.zeros(len(x), dtype=torch.float64) for _ in range(2))
    y = quantized(x[:, : quantized.spec.in_features])
    for rows in row_chunks(*problem.weight.shape, device=problem.weight.device):
        want = x @ problem.weight[rows].float().T
        if problem.bias is not None:
            want += problem.bias[rows].float()
        signal += want.double().square().sum(1).cpu()
        noise += (want - y[:, rows]).double().square().sum(1).cpu()
    points = []
    for at in _groups(times):
        error = float(noise[at].sum() / signal[at].sum().clamp(min=1e-30))
        if error > 0:
            points.append((float(times[at].mean()), -10 * math.log10(error)))
    return points


def _groups(times: torch.Tensor) -> list[torch.Tensor]:
    """Masks of the tokens of each point, by rising timestep."""
    known = times.unique()
    if len(known) <= MOST:
        return [times == time for time in known]
    return [torch.isin(times, part) for part in known.tensor_split(MOST)]


def section(found: dict[str, list[tuple[float, float]]], rows: Iterable[Row]) -> Section:
    """The curve of the median layer and of the worst one. found: {layer: what `by_timestep` gives}."""
    row_of = {row.name: row for row in rows}
    least = min(found, key=lambda name: min((db for _, db in found[name]), default=math.inf))
    # Layers of one model see the same steps, but a reservoir may have no token of one of them.
    times: dict[float, list[float]] = {}
    for line in found.values():
        for time, db in line:
            times.setdefault(round(time, 6), []).append(db)
    middle = [(time, median(values)) for time, values in sorted(times.items())]
    name = place_of(row_of[least]) if least in row_of else least
    return curves(
        "Error over the steps",
        "In dB, more is better; from noise (left) to picture (right).",
        {f"median of {len(found)} layers": middle, name: found[least]},
        "timestep",
        reverse=True,
    )
