"""`nibble quantize`: a checkpoint file in, a Nibble file out, layer by layer; a killed run goes on where it
stopped."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import prod
from pathlib import Path

from ...kernels.operator.errors import naming
from ..calibration.file import Calibration, CalibrationError
from ..calibration.observe import measured
from ..diffusers_host import model as diffusers_model
from ..diffusers_host.trainer import trainer_of
from ..families import Layer
from ..families.pointwise import why_unsure
from ..formats import nibble
from ..formats.checkpoint import Checkpoint
from ..layer.row import Row
from ..methods import Method
from ..run.layers import leave_out, require_statistics
from ..run.provenance import provenance
from ..run.stages import finished, quantize_blocks, steps_of
from ..run.unfinished import Unfinished
from ..run.unquantized import kept_rows
from ..store.atomic import require_output, require_room
from ..store.lock import only_run
from ..training.presets import UNTRAINED, Preset
from ..training.trainer import require_chain, require_trajectory


def quantize_file(
    source: Path,
    destination: Path,
    method: Method,
    config,
    calibration: Calibration | None = None,
    device: str = "cpu",
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
    base3: bool = False,
    preset: Preset = UNTRAINED,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Quantizes `source` into `destination` and returns the rows of the report. base3: as in `pack.save`;
    say(line): what a run before has left and is taken over.

    Each finished layer, with training each block, is kept in `<destination>.partial/` until the whole is
    written. Host memory: one layer at a time (1.3 GB above the page cache for a 12B FLUX with ConvRot);
    source and finished layers stay memory-mapped. With a preset that trains, the source must be a diffusers
    folder, whose model is loaded; the losses go to `<destination>.losses.json`. Raises the errors of
    Checkpoint, Calibration, `require_place`, `require_statistics`, Unfinished and of training, and Busy,
    before anything is computed, those of quantize_layers, with the name of `source` in front, and Trainer
    later.
    """
    checkpoint = Checkpoint(source)
    require_place(destination, checkpoint, calibration)
    with only_run(destination, f"quantizes {checkpoint.path.name} with {method.name}"):
        return _quantized(
            checkpoint, destination, method, config, calibration, device, progress, base3, preset, say
        )


def _quantized(checkpoint, destination, method, config, calibration, device, progress, base3, preset, say):
    fingerprint = checkpoint.fingerprint()
    if calibration is not None:
        calibration.require_model(fingerprint)
    settings = provenance(fingerprint, method.name, config, calibration)
    if preset != UNTRAINED:
        settings["training"] = asdict(preset)
        require_trajectory(calibration)
    layers = checkpoint.family.layers(checkpoint.shapes)
    unsure = {layer: why for layer in layers if (why := why_unsure(layer, calibration))}
    plan = measured([layer for layer in layers if layer not in unsure], calibration)
    require_statistics(plan, calibration)
    if preset != UNTRAINED:
        require_chain(checkpoint.family, plan)
    store = Unfinished(Path(f"{destination}.partial"), checkpoint.family.name, settings)
    if store.kept:
        say(store.text)
    else:
        require_room(
            destination,
            2 * codes(plan, method) + sum(prod(checkpoint.shapes[k]) for k in _others(checkpoint, plan)),
        )
    trainer = None
    if preset != UNTRAINED:
        model = diffusers_model.full(checkpoint.path, device)
        trainer = trainer_of(model, checkpoint.family, plan, calibration, device, store.folder, preset)
    before = states(checkpoint.files)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(checkpoint.sha256)
        work = quantize_blocks(
            plan,
            checkpoint.get,
            checkpoint.shapes,
            method,
            config,
            calibration,
            device,
            store,
            preset,
            trainer,
        )
        with naming(checkpoint.path, CalibrationError):
            for _ in progress(work, steps_of(plan, preset)):
                pass
        settings["source"] = {"file": checkpoint.path.name, "sha256": digest.result()}
    require_unchanged(before)
    quantized, rows = finished(plan, preset, store)
    leave_out(quantized, rows, plan)
    rows += [
        Row(layer.name, layer.block, layer.in_features, layer.out_features, "16 bit", note=why)
        for layer, why in unsure.items()
    ]
    rows += kept_rows(checkpoint.shapes, checkpoint.family, rows, calibration)
    rest = {k: checkpoint.get(k) for k in checkpoint.shapes if k.rpartition(".")[0] not in quantized}
    rows_json = [row.to_json() for row in rows]
    nibble.save(
        destination, quantized, rest, checkpoint.family.name, settings, rows_json, base3, checkpoint.origin
    )
    if trainer is not None and trainer.losses.is_file():
        trainer.losses.replace(f"{destination}.losses.json")
    store.remove()
    return rows


def require_place(destination: Path, checkpoint: Checkpoint, calibration: Calibration | None = None):
    """Raises OSError where `destination` cannot be written, OverInput where it would replace what is read."""
    require_output(destination, [*checkpoint.files, *(calibration.files if calibration is not None else ())])


def codes(plan: list[Layer], method: Method) -> int:
    """Bytes of the layers' codes alone: what their file takes at the least."""
    return sum(layer.in_features * layer.out_features for layer in plan) * method.bits // 8


def _others(checkpoint, plan) -> list[str]:
    names = {layer.name for layer in plan}
    return [k for k in checkpoint.shapes if k.rpartition(".")[0] not in names]


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
