"""A quantized model from a full-precision one, in the graph: what the nodes that quantize share."""

import hashlib
import json
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels import paths_of
from ...kernels.operator.spec import LinearSpec
from ...kernels.target import target_of
from ...quant_core.calibration.file import Calibration
from ...quant_core.calibration.observe import measured
from ...quant_core.families import Layer
from ...quant_core.formats.kitchen.dense import lost_text
from ...quant_core.layer.row import Row
from ...quant_core.methods import Method
from ...quant_core.run.model import Job
from ...quant_core.run.model import quantized as run_of_model
from ...quant_core.run.provenance import provenance
from ...quant_core.run.source import rest_of
from ...quant_core.run.stages import blocks_of, steps_of
from ...quant_core.training.presets import UNTRAINED, Preset
from ...quant_core.training.trainer import trainer_of
from .build import build, frame_like
from .inherited import inherit_sampling_patches, uncompiled
from .patcher import NibblePatcher
from .progress import Shown, logged, shown, steps
from .source import ModelSource


def store_path(calibration: Calibration | None, source: ModelSource, provenance: dict, kind: str) -> Path:
    """Where a run keeps what is finished: beside the calibration, or where it would be; a folder for each
    choice of options."""
    key = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(folder_paths.get_output_directory()) / "nibble_calibration"
    path = folder / source.family.name if calibration is None else calibration.path
    return Path(f"{path}.{key}.{kind}")


def _trainer(model, job, folder):
    comfy.model_management.load_models_gpu([uncompiled(model)])
    source, calibration = job.source, job.calibration
    modules = {layer.name: [(source.modules[layer.name], slice(0, layer.out_features))] for layer in job.plan}
    blocks = {name: name for name, _ in blocks_of(job.plan)}
    streams = source.family.stream_of(source.family.streams)
    check = comfy.model_management.throw_exception_if_processing_interrupted
    device = model.load_device
    return trainer_of(
        source.network, blocks, modules, streams, calibration, job.preset, folder, device, check, steps
    )


@contextmanager
def _in_training():
    """ComfyUI's own flag: its kernels of rotary embeddings have no gradient."""
    was_training = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = was_training


def make_room(plan: list[Layer], device: torch.device | str) -> None:
    """fp32 weight, residual, factor and codes of the largest layer: 16 bytes a weight."""
    if not comfy.model_management.is_device_cpu(device) and plan:
        comfy.model_management.free_memory(
            16 * max(layer.in_features * layer.out_features for layer in plan) + 2**30, device
        )


@dataclass(frozen=True)
class Made:
    """A quantized model and what there is to say of it.

    rows: of its report; specs: {layer: LinearSpec}; notes: lines on what the source and a stopped run
    have left; paths:
    {layer: the kernels it runs on here}, lines: the same in short.
    """

    model: NibblePatcher
    rows: list[Row]
    specs: dict[str, LinearSpec]
    notes: list[str]
    paths: dict[str, str]
    lines: list[str]


def quantize_model(
    model: ModelPatcher,
    source: ModelSource,
    method: Method,
    config: object,
    calibration: Calibration | None,
    preset: Preset = UNTRAINED,
) -> Made:
    """All layers of `model` by one method; what Nibble Quantize does. source: the ModelSource of it. Raises
    before the work what `quantized` and `require_model` do."""
    if preset != UNTRAINED:
        source.require_trainable()
    fingerprint = source.fingerprint()
    if calibration is not None:
        calibration.require_model(fingerprint)
    plan = measured(source.layers, calibration)
    device = comfy.model_management.get_torch_device()
    make_room(plan, device)
    told = f"{source.family.title}, {method.title}, {len(plan)} layers"
    # ComfyUI runs nodes under inference mode, whose tensors no later LoRA or training could touch.
    with logged("Nibble Quantize", told), torch.inference_mode(False), torch.no_grad():
        origin = provenance(fingerprint, method.name, config, calibration)
        return quantized(model, source, plan, method, config, calibration, origin, device, preset)


def quantized(
    model: ModelPatcher,
    source: ModelSource,
    plan: list[Layer],
    method: Method,
    config: object,
    calibration: Calibration | None,
    provenance: dict,
    device: torch.device | str,
    preset: Preset = UNTRAINED,
) -> Made:
    """The model with its layers quantized and what nodes before have set on it.

    source: the ModelSource of `model`. plan: its layers. To be called outside of inference mode, whose
    tensors no later LoRA or training could touch. A stopped run goes on behind its last finished layer, with
    training behind its last finished block; after a training those stay beside the calibration.
    """
    job = Job(source, plan, method, config, calibration, provenance, device, preset)
    frame = frame_like(model, source.shapes)  # whatever ComfyUI cannot make fails before the fit
    folder = store_path(calibration, source, provenance, "training" if job.trained else "partial")
    bar = Shown("Training", "blocks") if job.trained else Shown("Quantizing", "layers")

    def begin(store):
        if store.kept:
            logging.info(f"Nibble: {store.text}")
        total = steps_of(plan, preset)
        bar.begin(total, min(store.kept, total))

    with run_of_model(
        job,
        folder,
        trainer=lambda folder: _trainer(model, job, folder),
        begin=begin,
        working=_in_training if job.trained else nullcontext,
        progress=shown(on=bar),
        keep=job.trained,
    ) as done:
        made, specs = _built(model, source, provenance, frame, done)
    paths, lines = paths_of(specs, target_of(device))
    notes = [text for text in (lost_text(source.kinds), done.kept) if text]
    return Made(made, done.rows, specs, notes, paths, lines)


def _built(model, source, provenance, frame, done):
    """(the model, {layer: LinearSpec}) of finished layers, which are memory-mapped from files that may be
    removed afterwards."""
    rest = {key: source.get(key).to("cpu", copy=True) for key in rest_of(source, done.layers)}
    info = {
        "family": source.family.name,
        "provenance": provenance,
        "report": [row.to_json() for row in done.rows],
        "source": f"{source.family.title}, quantized in the graph",
    }
    layers = dict(done.layers)
    specs = {name: layer.spec for name, layer in layers.items()}
    in_memory = lambda name: layers.pop(name).in_memory() if name in layers else None
    made = build(in_memory, specs, rest, info, frame)
    inherit_sampling_patches(model, made)
    return made, specs
