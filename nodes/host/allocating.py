"""A model with a precision for each layer: what Nibble Allocate Bits does."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_core.calibration.file import Calibration
from ...quant_core.calibration.gains import of_calibration
from ...quant_core.calibration.observe import measured
from ...quant_core.precision.allocate import Allocated, Budget, measure_and_decide, with_choice
from ...quant_core.precision.menu import MIXED, MixedConfig
from ...quant_core.run.layers import require_statistics
from ...quant_core.run.provenance import provenance
from .inherited import uncompiled
from .progress import logged, shown
from .quantized import Made, make_room, quantized
from .saving import narrow
from .source import ModelSource

NAME = "Nibble Allocate Bits"


def allocated_model(
    model: ModelPatcher,
    source: ModelSource,
    calibration: Calibration,
    asked: Budget,
    config: MixedConfig,
    use_gains: bool,
) -> tuple[Made, Allocated]:
    """(the model, what was chosen for its layers and why). source: the ModelSource of `model`. Raises
    CalibrationError before the work where the calibration is another model's, and BudgetError for a budget
    that nothing meets, once all is measured."""
    fingerprint = source.fingerprint()
    calibration.require_model(fingerprint)
    plan = measured(source.layers, calibration)
    require_statistics(plan, calibration)
    device = comfy.model_management.get_torch_device()
    with logged(NAME, f"{source.family.title}, {asked.text()}, {len(plan)} layers"):
        # First: it needs the whole network on the device, the rest one layer at a time.
        names = [layer.name for layer in with_choice(plan)]
        gains = gains_of(model, source, calibration, names) if use_gains else None
        make_room(plan, device)
        # ComfyUI runs nodes under inference mode, whose tensors no later LoRA or training could touch.
        with torch.inference_mode(False), torch.no_grad():
            settings = provenance(fingerprint, "sensitivity", config, calibration)
            done = measure_and_decide(
                source,
                plan,
                calibration,
                asked,
                config,
                gains,
                table_path(calibration, settings),
                settings,
                device,
                shown("Measuring"),
                size=lambda tensor: narrow(tensor).nbytes,
            )
            chosen = replace(config, layers=done.allocation.layers)
            origin = provenance(fingerprint, MIXED.name, chosen, calibration)
            origin["allocation"] = {
                "budget": asked.text(),
                "reached": asked.text(done.allocation.reached),
                "gains": use_gains,
            }
            made = quantized(model, source, plan, MIXED, chosen, calibration, origin, device)
    return made, done


def gains_of(
    model: ModelPatcher, source: ModelSource, calibration: Calibration, names: list[str]
) -> dict[str, float]:
    """{layer: factor}; the model is loaded only where something is left to measure. source: the ModelSource
    of it."""

    def network():
        comfy.model_management.load_models_gpu([uncompiled(model)])
        return source.network, {name: [source.modules[name]] for name in names}

    return of_calibration(calibration, names, network, model.load_device, shown("Weighing"))


def table_path(calibration: Calibration, settings: dict) -> Path:
    """Beside the calibration; one file for each menu, rank and GPTQ."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return Path(f"{calibration.path}.{key}.sensitivity.json")
