"""Quantizes a model layer by layer; at any time one layer's weight is in memory in full precision."""

import time
from collections.abc import Iterable, Iterator

import torch

from ...kernels.operator.quantizers import GROUP
from ...kernels.operator.spec import SpecError
from ..calibration.file import Calibration, CalibrationError
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem, output_sqnr
from ..layer.row import Row
from ..layer.soundness import require_sound
from ..methods import Method, fit_problem
from .report import sensitive
from .source import Weights

# Bytes that a fit takes at the most, a weight and a second moment of the layer's widest part.
FITTING_WEIGHTS, FITTING_MOMENTS = 40, 24


def quantize_layers(
    layers: Iterable[Layer],
    source: Weights,
    method: Method,
    config,
    calibration: Calibration | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[QuantizedLayer | None, Row]]:
    """Yields each layer, quantized and back on the CPU, with its row of the report; None where it stays in 16
    bit.

    source: of the weights and biases. calibration: one that `require_statistics` takes. Raises UnfitLayer,
    which names the layer.
    """
    for layer in layers:
        started = time.perf_counter()
        if reason := not_quantizable(layer):
            yield None, Row.in_16_bit(layer, reason)
            continue
        problem = problem_of(layer, source, calibration, device)
        try:
            fitted = fit_problem(problem, method, config)
        except SpecError as error:
            raise SpecError(f"layer {layer.name}: {error}") from error
        if fitted.layer is None:
            note = "; ".join(f"{k} {v}" for k, v in fitted.choices.items())
            yield None, Row.in_16_bit(layer, note)
            continue
        sqnr = output_sqnr(problem, fitted.layer)
        cpu = fitted.layer.to("cpu")
        row = Row(layer.name, layer.block, layer.in_features, layer.out_features, cpu.spec.describe())
        row.sqnr_db, row.choices, row.nbytes = sqnr, fitted.choices, cpu.nbytes
        row.seconds = time.perf_counter() - started
        yield cpu, row


def problem_of(
    layer: Layer, source: Weights, calibration: Calibration | None, device, second_moments: bool = True
) -> Problem:
    """A layer's weight, bias and statistics on the device, filled up to whole groups of 64; the statistics
    None without calibration.

    Arguments as in `quantize_layers`; second_moments False leaves them on the disk. Raises UnfitLayer as
    `require_sound` does, and CalibrationError.
    """
    weight = source.get(f"{layer.name}.weight").to(device).flatten(1)  # a convolution's as a linear layer's
    bias = source.get(f"{layer.name}.bias").to(device) if f"{layer.name}.bias" in source.shapes else None
    statistics = None
    if calibration is not None and _wants_statistics(layer, calibration):
        statistics = calibration.get(layer.input, second_moments)
    problem = Problem(layer, weight, bias, statistics)
    require_sound(problem, None if calibration is None else calibration.path)
    return problem.filled()


def _wants_statistics(layer, calibration):
    # Calibrations of 0.2 and before have no inputs of weight-only layers; those are rounded to nearest then.
    return not layer.weight_only or layer.input in calibration.names


def require_statistics(layers: Iterable[Layer], calibration: Calibration | None):
    """Raises CalibrationError where a layer's input was not observed, or at another width. From headers
    alone, to be called before anything is fitted."""
    if calibration is None:
        return
    for layer in layers:
        if not_quantizable(layer) or not _wants_statistics(layer, calibration):
            continue
        if (width := calibration.width(layer.input)) != layer.in_features:
            raise CalibrationError(
                f"layer {layer.name}: calibration {calibration.path} observed {width} in-channels, the "
                f"weight has {layer.in_features}. "
                "Calibrate with the model that is to be quantized."
            )


def not_quantizable(layer: Layer) -> str:
    """Why no kernel takes the layer, "" where one does."""
    for part in layer.parts[:-1]:  # zeros fill up the last
        if (part.stop - part.start) % GROUP:
            return f"in-channels {part.start}..{part.stop} do not divide by {GROUP}, and others follow them"
    return ""


def fitting_bytes(layer: Layer) -> int:
    """Memory that a fit of the layer takes, at the most: FITTING_WEIGHTS bytes a weight and FITTING_MOMENTS a
    second moment."""
    width = max(part.stop - part.start for part in layer.parts)
    return FITTING_WEIGHTS * layer.in_features * layer.out_features + FITTING_MOMENTS * width * width


def leave_out(layers: dict, rows: list[Row], plan: list[Layer]):
    """Takes out of `layers` what the rules found and what measured far worse than the rest, in place; its
    rows then say 16 bit and why."""
    by_rule = {layer.name for layer in plan if layer.rule}
    found = {name: why for name, why in sensitive(rows).items() if name in by_rule}
    for i, row in enumerate(rows):
        if why := found.get(row.name):
            layers.pop(row.name, None)
            rows[i] = Row(row.name, row.block, row.in_features, row.out_features, "16 bit", note=why)
