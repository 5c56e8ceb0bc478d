"""Nibble Quantize."""

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels import paths_of
from ..kernels.target import target_of
from ..quant_core.calibration.file import Calibration
from ..quant_core.calibration.observe import measured
from ..quant_core.methods import METHODS, by_name
from ..quant_core.run.provenance import provenance
from ..quant_core.run.report import quantization_text
from ..quant_core.training.presets import NAMES, preset
from .host.quantized import make_room, quantized
from .host.source import ModelSource
from .host.types import CalibrationType

DESCRIPTION = (
    "Quantizes the transformer blocks of a model to 4-bit weights and activations, layer by layer, and "
    "reports what it cost."
)
TOOLTIPS = {
    "model": (
        "The full-precision model. LoRAs on it are merged and quantized with it; LoRAs after this node stay "
        "exchangeable."
    ),
    "calibration": (
        "From Nibble Calibrate on the same model. Without it the quantization is data-free: much worse for "
        "SVDQuant, the same for ConvRot and RTN."
    ),
    "method": (
        "svdquant_r: SVDQuant with a rotation in the layers where it helps, the default. svdquant: without, "
        "in comfy-kitchen's svdquant_w4a4 conventions. splitquant: 4 slices share a transform, no low rank "
        "and no groups. convrot: ComfyUI's own, no low rank. rtn: baseline. robuq: ternary weights and a low "
        "rank, about half of svdquant's memory at a clear loss (pictures of the small test model 29 dB close "
        "to the original, svdquant_r 37). native: what ComfyUI runs without this pack, 4 or 8 bits a layer, "
        "whichever is good enough."
    ),
    "rank": (
        "SVDQuant and RobuQ: rank of the 16-bit branch. 32 costs 0.2 to 0.35 bits a weight at FLUX's widths."
    ),
    "gptq": (
        "SVDQuant, SplitQuant and RobuQ: also try GPTQ rounding and keep it where it is better on held-out "
        "tokens."
    ),
    "training": (
        "SplitQuant and RobuQ: then train what was quantized against the full-precision model, on inputs of "
        "the network that the calibration recorded. standard: minutes on the pack's small model. best: "
        "longer. Stopped runs go on where they were; what is finished stays in a folder beside the "
        "calibration."
    ),
}
OUTPUT_TOOLTIPS = {
    "model": "The quantized model; takes samplers and LoRA loaders as any other.",
    "report": "Size and error of each layer. Connect to Preview as Text.",
}


class NibbleQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantize",
            display_name="Nibble Quantize",
            category="Nibble",
            description=DESCRIPTION,
            search_aliases=["quantization", "svdquant", "int4", "w4a4", "convrot", "compress"],
            inputs=[
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                CalibrationType.Input("calibration", optional=True, tooltip=TOOLTIPS["calibration"]),
                io.Combo.Input(
                    "method", options=list(METHODS), default="svdquant_r", tooltip=TOOLTIPS["method"]
                ),
                io.Int.Input(
                    "rank", default=32, min=0, max=256, step=16, advanced=True, tooltip=TOOLTIPS["rank"]
                ),
                io.Boolean.Input("gptq", default=True, advanced=True, tooltip=TOOLTIPS["gptq"]),
                io.Combo.Input(
                    "training",
                    options=list(NAMES),
                    default="none",
                    optional=True,
                    tooltip=TOOLTIPS["training"],
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip=OUTPUT_TOOLTIPS["model"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        method: str,
        rank: int,
        gptq: bool,
        calibration: Calibration | None = None,
        training: str = "none",
    ) -> io.NodeOutput:
        chosen, trained = by_name(method), preset(method, training)
        source = ModelSource(model)
        config = chosen.configured(
            **{k: v for k, v in (("rank", rank), ("gptq", gptq)) if hasattr(chosen.config, k)}
        )
        fingerprint = source.fingerprint()
        if calibration is not None:
            calibration.require_model(fingerprint)
        plan = measured(source.layers, calibration)
        device = comfy.model_management.get_torch_device()
        make_room(plan, device)
        # ComfyUI runs nodes under inference mode, whose tensors no later LoRA or training could touch.
        with torch.inference_mode(False), torch.no_grad():
            origin = provenance(fingerprint, chosen.name, config, calibration)
            made, rows, specs, notes = quantized(
                model, source, plan, chosen, config, calibration, origin, device, trained
            )
        paths, lines = paths_of(specs, target_of(device))
        return io.NodeOutput(
            made,
            quantization_text(
                rows, f"{source.family.title}, {chosen.title}", [*notes, *lines], paths, source.shapes
            ),
        )
