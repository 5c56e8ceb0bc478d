"""Nibble Allocate Bits."""

import hashlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels import paths_of
from ..kernels.target import target_of
from ..quant_core.calibration.file import Calibration
from ..quant_core.calibration.gains import SAMPLES, STEPS, of_calibration
from ..quant_core.calibration.observe import measured
from ..quant_core.precision.allocate import Allocated, measure_and_decide, parse_budget, with_choice
from ..quant_core.precision.menu import MENUS, MIXED, MixedConfig
from ..quant_core.precision.menu import menu as menu_of
from ..quant_core.precision.plot import pixels
from ..quant_core.precision.report import allocation_text
from ..quant_core.run.layers import require_statistics
from ..quant_core.run.provenance import provenance
from ..quant_core.run.report import quantization_text
from .host.inherited import uncompiled
from .host.progress import steps
from .host.quantized import make_room, quantized
from .host.saving import narrow
from .host.source import ModelSource
from .host.types import CalibrationType

NAME = "Nibble Allocate Bits"

MENU_TEXT = " ".join(f"{name}: {', '.join(e.name for e in entries)}." for name, entries in MENUS.items())
DESCRIPTION = (
    "Measures every layer at each precision of a menu, gives each the one that leaves the least noise within "
    "a budget, and quantizes. Stopped runs go on where they were."
)
TOOLTIPS = {
    "model": "The full-precision model. LoRAs on it are merged and quantized with it.",
    "calibration": (
        "From Nibble Calibrate on the same model, with 2 samples or more. What is measured is kept beside "
        "it, so that another budget measures nothing again."
    ),
    "budget": (
        "A3: 3 activation bits on average. W2.5: weight bits. 600MB or 6.5GB: the size of the whole file. "
        "0.8x or 80%: at most this cost by the speed proxy, 1x with every layer at the menu's most expensive "
        "quantized entry (int8 products; all W4A4 is 0.5x, 16 bit 2x)."
    ),
    "menu": f"What a layer may be. {MENU_TEXT}",
    "use_gains": (
        "Weigh each layer's noise by how much of it arrives at the end of a sampling, replayed from inputs "
        "that the calibration recorded. Runs the network 10 times for each layer."
    ),
    "rank": "Rank of the 16-bit branches. 32 costs 0.2 to 0.35 bits a weight at FLUX's widths.",
    "gptq": "Also try GPTQ rounding and keep it where it is better on held-out tokens.",
}
GAINS_NOTE = f"Layer noise is weighted by gains measured on {SAMPLES} recorded samplings of {STEPS} steps."
NO_GAINS_NOTE = "Layer noise is not weighted by gains."
OUTPUT_TOOLTIPS = {
    "model": "The quantized model; takes samplers, LoRA loaders and Nibble Save Model.",
    "report": "What each layer takes and what the alternatives are. Connect to Preview as Text.",
    "plot": "Bits of each layer, and the least error of every other budget. Connect to Preview Image.",
}


class NibbleAllocateBits(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleAllocateBits",
            display_name=NAME,
            category="Nibble",
            description=DESCRIPTION,
            search_aliases=[
                "mixed precision",
                "bit allocation",
                "ternary",
                "robuq",
                "budget",
                "ampn",
                "sensitivity",
            ],
            inputs=[
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                CalibrationType.Input("calibration", tooltip=TOOLTIPS["calibration"]),
                io.String.Input("budget", default="A3", tooltip=TOOLTIPS["budget"]),
                io.Combo.Input("menu", options=list(MENUS), default="mixed", tooltip=TOOLTIPS["menu"]),
                io.Boolean.Input("use_gains", default=True, tooltip=TOOLTIPS["use_gains"]),
                io.Int.Input(
                    "rank", default=32, min=0, max=256, step=16, advanced=True, tooltip=TOOLTIPS["rank"]
                ),
                io.Boolean.Input("gptq", default=True, advanced=True, tooltip=TOOLTIPS["gptq"]),
            ],
            outputs=[
                io.Model.Output("model", tooltip=OUTPUT_TOOLTIPS["model"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
                io.Image.Output("plot", tooltip=OUTPUT_TOOLTIPS["plot"]),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        calibration: Calibration,
        budget: str,
        menu: str,
        use_gains: bool,
        rank: int,
        gptq: bool,
    ) -> io.NodeOutput:
        asked, config = parse_budget(budget), MixedConfig(menu_of(menu), rank, gptq)
        source = ModelSource(model)
        fingerprint = source.fingerprint()
        calibration.require_model(fingerprint)
        plan = measured(source.layers, calibration)
        require_statistics(plan, calibration)
        device = comfy.model_management.get_torch_device()
        # First: it needs the whole network on the device, the rest one layer at a time.
        gains = (
            gains_of(model, source, calibration, [layer.name for layer in with_choice(plan)])
            if use_gains
            else None
        )
        make_room(plan, device)
        # ComfyUI runs nodes under inference mode, whose tensors no later LoRA or training could touch.
        with torch.inference_mode(False), torch.no_grad():
            settings = provenance(fingerprint, "sensitivity", config, calibration)
            table = table_path(calibration, settings)
            size = lambda tensor: narrow(tensor).nbytes
            done = measure_and_decide(
                source, plan, calibration, asked, config, gains, table, settings, device, steps, size
            )
            chosen = replace(config, layers=done.allocation.layers)
            origin = provenance(fingerprint, MIXED.name, chosen, calibration)
            origin["allocation"] = {
                "budget": asked.text(),
                "reached": asked.text(done.allocation.reached),
                "gains": use_gains,
            }
            made, rows, specs, kept = quantized(
                model, source, plan, MIXED, chosen, calibration, origin, device
            )
        paths, lines = paths_of(specs, target_of(device))
        picture, notes = plotted(done)
        notes = [*kept, GAINS_NOTE if use_gains else NO_GAINS_NOTE, *notes]
        title = f"{source.family.title}, {NAME}"
        rows_text = quantization_text(
            rows, f"{source.family.title}, menu {menu}", lines, paths, source.shapes
        )
        text = [allocation_text(done, title), "", *notes, "", rows_text]
        return io.NodeOutput(made, "\n".join(text), picture)


def plotted(done: Allocated) -> tuple[torch.Tensor, list[str]]:
    """(an image, lines for the report): a white one and the reason where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return torch.ones(1, 64, 64, 3), ["No plot: matplotlib is not installed in ComfyUI's environment."]
    return pixels(done)[None], []


def gains_of(
    model: ModelPatcher, source: ModelSource, calibration: Calibration, names: list[str]
) -> dict[str, float]:
    """{layer: factor}; the model is loaded only where something is left to measure. source: the ModelSource
    of it."""

    def network():
        comfy.model_management.load_models_gpu([uncompiled(model)])
        return source.network, {name: [source.modules[name]] for name in names}

    return of_calibration(calibration, names, network, model.load_device, steps)


def table_path(calibration: Calibration, settings: dict) -> Path:
    """Beside the calibration; one file for each menu, rank and GPTQ."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return Path(f"{calibration.path}.{key}.sensitivity.json")
