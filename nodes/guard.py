"""Nibble Guard."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels import paths_of
from ..kernels.target import target_of
from ..quant_core.calibration.file import Calibration
from ..quant_core.layer.precisions import PRECISIONS
from ..quant_core.layer.row import Row
from ..quant_core.precision.guard_report import guard_text
from ..quant_core.precision.guarding import Asked
from ..quant_core.run.chart import chart
from ..quant_core.run.report import wrapped
from ..quant_core.run.verdict import verdict
from .host.build import ATTACHMENT
from .host.guarding import NAME, guarded_model
from .host.source import ModelSource
from .host.types import CalibrationType

QUALITY, MEMORY = "quality (dB)", "memory (MiB)"

DESCRIPTION = (
    "Measures each layer of a quantized model on the calibration's held-out tokens and keeps the worst at "
    "W4A8, W8A8 or 16 bit, under a stated quality or memory budget."
)
TOOLTIPS = {
    "model": "The full-precision model that the other one was quantized from, with the same LoRAs.",
    "quantized": (
        "The model to improve, from Nibble Quantize or Nibble Load Diffusion Model. It stays as it is."
    ),
    "calibration": (
        "From Nibble Calibrate on the full-precision model; errors are measured on its held-out tokens."
    ),
    "budget": (
        "quality: raise what is below quality_db, at the least extra memory. memory: take away as much noise "
        "as fits into memory_mib."
    ),
    "quality_db": (
        "For quality: SQNR that each layer, or the mean noise of each block, must reach. 20 dB is an error "
        "of 1 % of the energy."
    ),
    "memory_mib": (
        "For memory: how much larger the model may get. At 0 layers may still become W4A8, which costs speed "
        "on some cards but no memory."
    ),
    "unit": "layer: each on its own. block: the layers of a transformer block change together.",
    "allow_w4a8": (
        "Allow 8-bit activations on the same 4-bit weights. No extra memory; slower on cards with INT4 "
        "tensor cores."
    ),
    "allow_w8a8": (
        "Allow 8-bit weights and activations, without a low rank: 8 bits a weight instead of about 4.5."
    ),
    "allow_16_bit": "Allow the original weight in 16 bit. It has no error, so every quality can be reached.",
}
OUTPUT_TOOLTIPS = {
    "model": "A new model with the raised layers; takes samplers, LoRA loaders and Nibble Save Model.",
    "report": "What was raised and why, and what it costs. Connect to Preview as Text.",
    "picture": "A map of the layers after it, what was raised with a frame. Connect to Preview Image.",
}


class NibbleGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleGuard",
            display_name=NAME,
            category="Nibble/advanced",
            description=DESCRIPTION,
            search_aliases=["mixed precision", "sensitivity", "w8a8", "w4a8", "quality", "budget", "repair"],
            inputs=[
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                io.Model.Input("quantized", tooltip=TOOLTIPS["quantized"]),
                CalibrationType.Input("calibration", tooltip=TOOLTIPS["calibration"]),
                io.Combo.Input(
                    "budget", options=[QUALITY, MEMORY], default=QUALITY, tooltip=TOOLTIPS["budget"]
                ),
                io.Float.Input(
                    "quality_db", default=24.0, min=1.0, max=100.0, step=0.5, tooltip=TOOLTIPS["quality_db"]
                ),
                io.Float.Input(
                    "memory_mib",
                    default=256.0,
                    min=0.0,
                    max=1048576.0,
                    step=16.0,
                    tooltip=TOOLTIPS["memory_mib"],
                ),
                io.Combo.Input("unit", options=["layer", "block"], default="layer", tooltip=TOOLTIPS["unit"]),
                io.Boolean.Input("allow_w4a8", default=True, tooltip=TOOLTIPS["allow_w4a8"]),
                io.Boolean.Input("allow_w8a8", default=True, tooltip=TOOLTIPS["allow_w8a8"]),
                io.Boolean.Input("allow_16_bit", default=True, tooltip=TOOLTIPS["allow_16_bit"]),
            ],
            outputs=[
                io.Model.Output("model", tooltip=OUTPUT_TOOLTIPS["model"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
                io.Image.Output("picture", tooltip=OUTPUT_TOOLTIPS["picture"]),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        quantized: ModelPatcher,
        calibration: Calibration,
        budget: str,
        quality_db: float,
        memory_mib: float,
        unit: str,
        allow_w4a8: bool,
        allow_w8a8: bool,
        allow_16_bit: bool,
    ) -> io.NodeOutput:
        allowed = tuple(
            p for p, wanted in zip(PRECISIONS, (allow_w4a8, allow_w8a8, allow_16_bit), strict=True) if wanted
        )
        if not allowed:
            raise ValueError(
                f"{NAME}: no precision is allowed. Switch on at least one of W4A8, W8A8 and 16 bit."
            )
        by, limit = ("quality", quality_db) if budget == QUALITY else ("memory", int(memory_mib * 2**20))
        asked = Asked(by, limit, unit == "block", allowed)
        asked.require_sense()
        source = ModelSource(model)
        result, decision, specs, device = guarded_model(source, quantized, calibration, asked)
        paths, lines = paths_of(specs, target_of(device))
        title = f"{source.family.title}, {NAME}"
        rows = [Row.from_json(row) for row in result.attachments[ATTACHMENT]["report"]]
        marked = frozenset(decision.layers)
        picture, missing = chart(rows, source.shapes, title, paths, marked=marked)
        text = guard_text(decision, title, verdict(rows, source.shapes).text)
        return io.NodeOutput(result, "\n".join([text, "", *wrapped("\n".join([*lines, *missing]))]), picture)
