"""`nibble allocate`: a checkpoint in; measured, allocated and quantized at the chosen widths; a Nibble file
out."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from ...kernels.operator.errors import naming
from ..calibration.file import Calibration, CalibrationError
from ..calibration.gains import SAMPLES, of_calibration
from ..calibration.observe import measured
from ..families import Layer
from ..families.pointwise import why_unsure
from ..formats.checkpoint import Checkpoint
from ..layer.row import Row
from ..precision.allocate import Allocated, Budget, measure_and_decide, with_choice
from ..precision.budget import BudgetError
from ..precision.menu import MIXED, MixedConfig
from ..run.layers import require_statistics
from ..run.provenance import provenance
from ..store.lock import only_run
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from .quantize import quantize_file, require_place


def allocate_file(
    source: Path,
    destination: Path,
    calibration: Calibration,
    budget: Budget,
    config: MixedConfig,
    weights: Mapping[str, float] | None = None,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda unit: silent,
    base3: bool = False,
    say: Callable[[str], None] = lambda line: None,
    workers: Workers = HERE,
) -> tuple[Allocated, list[Row]]:
    """Returns the allocation and the rows of the report. A memory budget is for all tensors of the file, as
    they are in memory: base3, see `nibble.save`, makes the file smaller than that.

    The sensitivities stay in `<destination>.sensitivity.json`: a stopped run goes on there, and another
    budget measures nothing again. weights: as in `allocate`, of `gains.measure`. progress(unit): a progress
    bar. workers: who measures and fits. Raises BudgetError before anything is quantized, and the errors of
    `sensitivity` and `quantize_file`.
    """
    checkpoint, fingerprint, layers = opened(source, destination, calibration)
    settings = provenance(fingerprint, "sensitivity", config, calibration)
    _, path, _ = outputs_of(destination)
    but = (CalibrationError, BudgetError)
    with only_run(path, f"measures {checkpoint.path.name}"), naming(checkpoint.path, but):
        done = measure_and_decide(
            checkpoint,
            layers,
            calibration,
            budget,
            config,
            weights,
            path,
            settings,
            device,
            progress("layer"),
            workers=workers,
        )
    chosen = replace(config, layers=done.allocation.layers)
    rows = quantize_file(
        source,
        destination,
        MIXED,
        chosen,
        calibration,
        device,
        progress("layer"),
        base3,
        say=say,
        workers=workers,
    )
    return done, rows


def outputs_of(destination: Path) -> tuple[Path, Path, Path]:
    """The files that the command writes: the model, the table of sensitivities, the plot."""
    return Path(destination), Path(f"{destination}.sensitivity.json"), Path(f"{destination}.png")


def opened(source: Path, destination: Path, calibration: Calibration) -> tuple[Checkpoint, str, list[Layer]]:
    """(the checkpoint, its fingerprint, its layers), once it is sure that the calibration fits and the
    destination can be written."""
    checkpoint = Checkpoint(source)
    for out in outputs_of(destination):
        require_place(out, checkpoint, calibration)
    fingerprint = checkpoint.fingerprint()
    calibration.require_model(fingerprint)
    layers = measured(_sure(checkpoint, calibration), calibration)
    require_statistics(layers, calibration)
    return checkpoint, fingerprint, layers


def read_gains(path: Path) -> dict[str, float]:
    """{layer: factor} of a JSON file. Raises ValueError naming the file and what is no number of 0 or
    more."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text, numbers of thousands of digits
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object {{layer: number}}, found {type(found).__name__}")
    for layer, gain in found.items():
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 <= gain < math.inf:
            raise ValueError(f"{path}: gain of {layer}: expected a number of 0 or more, found {gain!r}")
    return found


def measured_gains(
    source: Path,
    calibration: Calibration,
    device: str = "cpu",
    progress: Progress = silent,
    samples: int = SAMPLES,
    workers: Workers = HERE,
):
    """{layer: factor}, of `gains.of_calibration`, for the model of a diffusers `transformer` folder; kept
    beside the calibration. workers: who measures, each with a model of its own.

    Raises the errors of `of_calibration` and, where something is left to measure, ValueError for a source
    that is no such folder.
    """
    checkpoint = Checkpoint(source)
    calibration.require_model(checkpoint.fingerprint())
    layers = with_choice(measured(_sure(checkpoint, calibration), calibration))
    names, network = [layer.name for layer in layers], Network(checkpoint, layers, device)
    # In fp32 on a CPU, and once more for what a sampling keeps.
    memory = (8 if device == "cpu" else 3) * sum(prod(shape) for shape in checkpoint.shapes.values())
    with naming(checkpoint.path, CalibrationError):
        return of_calibration(calibration, names, network, device, progress, samples, workers, memory)


@dataclass(frozen=True)
class Network:
    """Loads (the model of a diffusers folder, {layer: its modules})."""

    checkpoint: Checkpoint
    layers: list[Layer]
    device: str

    def __call__(self) -> tuple[torch.nn.Module, dict[str, list[torch.nn.Module]]]:
        from ..diffusers_host import model as diffusers_model

        model = diffusers_model.full(self.checkpoint.path, self.device)
        names = diffusers_model.modules_of(self.checkpoint.family, self.layers, model)
        return model, {name: [model.get_submodule(t) for t in targets] for name, targets in names.items()}


def _sure(checkpoint, calibration) -> list[Layer]:
    return [
        layer for layer in checkpoint.family.layers(checkpoint.shapes) if not why_unsure(layer, calibration)
    ]
