"""A quantized model from a full-precision one, in the graph: what Nibble Quantize and Nibble Allocate Bits
share."""

import hashlib
import json
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.operator.spec import LinearSpec
from ...quant_core.calibration.file import Calibration
from ...quant_core.calibration.gains import of_calibration
from ...quant_core.families.layer import Layer
from ...quant_core.layer.linear import QuantizedLayer
from ...quant_core.layer.row import Row
from ...quant_core.methods import Method
from ...quant_core.run.layers import leave_out, require_statistics
from ...quant_core.run.stages import blocks_of, finished, quantize_blocks, steps_of
from ...quant_core.run.unfinished import Unfinished
from ...quant_core.run.unquantized import kept_rows
from ...quant_core.store.lock import only_run
from ...quant_core.training.presets import UNTRAINED, Preset
from ...quant_core.training.trainer import Trainer, require_chain, require_trajectory
from .build import build, frame_like
from .inherited import inherit_sampling_patches, uncompiled
from .patcher import NibblePatcher
from .progress import steps
from .source import ModelSource


def store_path(calibration: Calibration | None, source: ModelSource, provenance: dict, kind: str) -> Path:
    """Where a run keeps what is finished: beside the calibration, or where it would be; a folder for each
    choice of options."""
    key = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(folder_paths.get_output_directory()) / "nibble_calibration"
    path = folder / source.family.name if calibration is None else calibration.path
    return Path(f"{path}.{key}.{kind}")


def _trainer(model, source, plan, calibration, store, preset):
    comfy.model_management.load_models_gpu([uncompiled(model)])
    network = source.network
    modules = {layer.name: [(source.modules[layer.name], slice(0, layer.out_features))] for layer in plan}
    blocks = {name: [source.modules[name]] for name, _ in blocks_of(plan)}
    gains = (
        of_calibration(calibration, list(blocks), lambda: (network, blocks), model.load_device, steps)
        if preset.adaptive
        else None
    )
    streams = source.family.stream_of(source.family.streams)
    check = comfy.model_management.throw_exception_if_processing_interrupted
    return Trainer(
        network,
        list(blocks),
        modules,
        calibration.trajectory(),
        store.folder,
        model.load_device,
        streams,
        gains,
        check,
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
) -> tuple[NibblePatcher, list[Row], dict[str, LinearSpec], list[str]]:
    """(the model with its layers quantized and what nodes before have set on it, rows of the report, {layer:
    LinearSpec}, lines for the report on what a stopped run has left).

    source: the ModelSource of `model`. plan: its layers. To be called outside of inference mode, whose
    tensors no later LoRA or training could touch. A stopped run goes on behind its last finished layer, with
    training behind its last finished block; after a training those stay beside the calibration.
    """
    require_statistics(plan, calibration)
    if trained := preset != UNTRAINED:
        require_trajectory(calibration)
        require_chain(source.family, plan)
        provenance["training"] = asdict(preset)
    frame = frame_like(model)  # whatever ComfyUI cannot make fails before the fit
    folder = store_path(calibration, source, provenance, "training" if trained else "partial")
    with only_run(folder, f"quantizes with {method.name}"):
        store = Unfinished(folder, source.family.name, provenance)
        notes = [store.text] if store.kept else []
        for note in notes:
            logging.info(f"Nibble: {note}")
        trainer = _trainer(model, source, plan, calibration, store, preset) if trained else None
        work = quantize_blocks(
            plan, source.get, source.shapes, method, config, calibration, device, store, preset, trainer
        )
        with _in_training() if trained else nullcontext():
            for _ in steps(work, steps_of(plan, preset)):
                pass
        layers, rows = finished(plan, preset, store)
        made, specs = _built(model, source, plan, calibration, provenance, frame, layers, rows)
        if not trained:
            store.remove()
    return made, rows, specs, notes


def _built(model, source, plan, calibration, provenance, frame, layers, rows):
    """(the model, {layer: LinearSpec}) of finished layers, which are memory-mapped from files that may be
    removed afterwards."""
    leave_out(layers, rows, plan)
    rows += kept_rows(source.shapes, source.family, rows, calibration)
    rest = {k: source.get(k).to("cpu", copy=True) for k in source.keys if k.rpartition(".")[0] not in layers}
    info = {
        "family": source.family.name,
        "provenance": provenance,
        "report": [r.to_json() for r in rows],
        "source": f"{source.family.title}, quantized in the graph",
    }
    specs = {name: layer.spec for name, layer in layers.items()}
    made = build(lambda name: _in_memory(layers.pop(name, None)), specs, rest, info, frame)
    inherit_sampling_patches(model, made)
    return made, specs


def _in_memory(layer):
    return layer and QuantizedLayer(layer.name, layer.spec, {k: t.clone() for k, t in layer.tensors.items()})
