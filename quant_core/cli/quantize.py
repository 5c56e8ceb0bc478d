"""`nibble quantize`: a checkpoint file in, a Nibble file out, layer by layer; a killed run goes on where it
stopped."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ...kernels.operator.errors import naming
from ..calibration.file import Calibration, CalibrationError
from ..calibration.observe import measured
from ..diffusers_host import model as diffusers_model
from ..diffusers_host.trainer import trainer_of
from ..families import Layer
from ..families.pointwise import why_unsure
from ..formats import nibble
from ..formats.checkpoint import Checkpoint
from ..formats.kitchen.dense import lost_text
from ..layer.row import Row
from ..methods import Method
from ..precision.guard_report import guard_text, rows_after
from ..precision.guarding import Asked, guarded, raise_worst, to_measure
from ..run.model import Job, quantized
from ..run.provenance import provenance
from ..run.source import rest_of
from ..run.unfinished import Unfinished
from ..store.atomic import require_output, require_room
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from ..training.presets import UNTRAINED, Preset
from ..training.trainer import LOSSES, Trainer


def quantize_file(
    source: Path,
    destination: Path,
    method: Method,
    config,
    calibration: Calibration | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    base3: bool = False,
    preset: Preset = UNTRAINED,
    say: Callable[[str], None] = lambda line: None,
    guard: Asked | None = None,
    workers: Workers = HERE,
) -> list[Row]:
    """Quantizes `source` into `destination` and returns the rows of the report. base3: as in `nibble.save`;
    guard: also raise the worst layers, with a limit in bytes of the whole model; say(text): what the source
    has lost, what a run before has left and is taken over, what was raised; workers: who fits the layers.

    Each finished layer, with training each block, is kept in `<destination>.partial/` until the whole is
    written. Host memory: one layer at a time (1.3 GB above the page cache for a 12B FLUX with ConvRot);
    source and finished layers stay memory-mapped. A preset that trains wants a diffusers folder, whose model
    is loaded; its losses go to `<destination>.losses.json`. Raises the errors of Checkpoint, Calibration,
    `require_place`, Job and Unfinished, and Busy, before anything is computed, and later those of
    `quantize_layers`, with the name of `source` in front, and of Trainer.
    """
    checkpoint = Checkpoint(source)
    for out in (destination, *([_losses(destination)] if preset != UNTRAINED else [])):
        require_place(out, checkpoint, calibration)
    job = _job(checkpoint, method, config, calibration, device, preset)
    digest = []

    def begin(store: Unfinished):
        if checkpoint.kinds:
            say(lost_text(checkpoint.kinds))
        digest.append(pool.submit(checkpoint.sha256))
        if store.kept:
            say(store.text)
        else:
            require_room(destination, _least_bytes(checkpoint, job.plan, method))

    def trainer(folder: Path) -> Trainer:
        assert calibration is not None  # a Job that trains has one
        model = diffusers_model.full(checkpoint.path, device)
        return trainer_of(model, checkpoint.family, job.plan, calibration, device, folder, preset)

    before, named = states(checkpoint.files), lambda: naming(checkpoint.path, but=CalibrationError)
    doing, folder = f"quantizes {checkpoint.path.name} with {method.name}", Path(f"{destination}.partial")
    asked: dict[str, Any] = {"trainer": trainer, "begin": begin, "working": named, "progress": progress}
    run = quantized(job, folder, lock=destination, doing=doing, workers=workers, **asked)
    with ThreadPoolExecutor(1) as pool, run as done:
        require_unchanged(before)
        job.settings["source"] = {"file": checkpoint.path.name, "sha256": digest[0].result()}
        settings = job.settings
        if guard is not None and calibration is not None and guard.needed(done.rows):
            done, settings, told = _raised(guard, checkpoint, job, calibration, done, progress, workers)
            say(told)
        _write(destination, checkpoint, settings, done, base3)
        if (folder / LOSSES).is_file():
            (folder / LOSSES).replace(_losses(destination))
    return done.rows


def _job(checkpoint, method, config, calibration, device, preset) -> Job:
    fingerprint = checkpoint.fingerprint()
    if calibration is not None:
        calibration.require_model(fingerprint)
    layers = checkpoint.family.layers(checkpoint.shapes)
    unsure = {layer: why for layer in layers if (why := why_unsure(layer, calibration))}
    plan = measured([layer for layer in layers if layer not in unsure], calibration)
    left = tuple(Row.in_16_bit(layer, why) for layer, why in unsure.items())
    settings = provenance(fingerprint, method.name, config, calibration)
    return Job(checkpoint, plan, method, config, calibration, settings, device, preset, left)


def _raised(guard, checkpoint, job, calibration, done, progress, workers):
    """(done, provenance, text) with the worst layers raised."""
    guard = guard.beside(done.rows, checkpoint.shapes)
    layers = dict(done.layers)
    plan = to_measure(job.plan, layers)
    decision, made, _ = raise_worst(
        guard, plan, layers, checkpoint, calibration, job.device, lambda doing: progress, workers
    )
    layers |= {name: layer for name, layer in made.items() if layer is not None}
    rows = [Row(**row) for row in rows_after([row.to_json() for row in done.rows], decision, made)]
    settings = guarded(job.settings, decision, calibration)
    return replace(done, layers=layers, rows=rows), settings, guard_text(decision, "Layers raised afterwards")


def _write(destination, checkpoint, settings, done, base3):
    rest = {key: checkpoint.get(key) for key in rest_of(checkpoint, done.layers)}
    report = [row.to_json() for row in done.rows]
    family, origin = checkpoint.family.name, checkpoint.origin
    nibble.save(destination, done.layers, rest, family, settings, report, base3, origin)


def _losses(destination) -> Path:
    return Path(f"{destination}.losses.json")


def require_place(destination: Path, checkpoint: Checkpoint, calibration: Calibration | None = None):
    """Raises OSError where `destination` cannot be written, OverInput where it would replace what is read."""
    require_output(destination, [*checkpoint.inputs, *(calibration.files if calibration is not None else ())])


def _least_bytes(checkpoint, plan, method) -> int:
    """What the layers' codes take twice, finished and in the file, and all that stays in 16 bit, at a byte a
    value."""
    rest = rest_of(checkpoint, (layer.name for layer in plan))
    return 2 * codes(plan, method) + sum(prod(checkpoint.shapes[key]) for key in rest)


def codes(plan: list[Layer], method: Method) -> int:
    """Bytes of the layers' codes alone: what their file takes at the least."""
    return sum(layer.in_features * layer.out_features for layer in plan) * method.bits // 8


def states(files: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """{file: (size, time of the last change)}."""
    return {file: ((found := file.stat()).st_size, found.st_mtime_ns) for file in files}


def require_unchanged(before: dict[Path, tuple[int, int]]):
    """Raises ValueError naming a file that has changed since `states`."""
    for file, state in before.items():
        if not file.exists() or states([file])[file] != state:
            raise ValueError(
                f"{file}: has changed while it was quantized. Run the command again: what was made of "
                "unchanged layers is kept."
            )
