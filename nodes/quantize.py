"""Nibble Quantize."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels.operator.codes import INT, NVFP4
from ..quant_core.calibration.file import Calibration
from ..quant_core.methods import METHODS, by_name
from ..quant_core.run.chart import chart
from ..quant_core.run.report import quantization_text
from ..quant_core.training.presets import NAMES, preset
from .host.quantized import quantize_model
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
        "svdquant_r is the best and the default. native: for a ComfyUI without this pack. robuq: smallest, "
        "with a clear loss. convrot: needs no calibration. The help page of the node has all of them."
    ),
    "rank": (
        "SVDQuant and RobuQ: rank of the 16-bit branch. 32 costs 0.2 to 0.35 bits a weight at FLUX's widths."
    ),
    "gptq": (
        "SVDQuant, SplitQuant and RobuQ: also try GPTQ rounding and keep it where it is better on held-out "
        "tokens."
    ),
    "training": (
        "Only splitquant, splitquant_4, robuq: then train the layers against the full-precision model, on "
        "inputs that the calibration recorded. best takes longer than standard. Stopped runs go on."
    ),
    "grid": (
        "SVDQuant, ConvRot and rtn. nvfp4: 4-bit floating point, closer and, on RTX 50 and B200, meant to be "
        "faster; no such card has run it yet. Other cards hold it in 8 bits, at twice the memory."
    ),
}
OUTPUT_TOOLTIPS = {
    "model": "The quantized model; takes samplers and LoRA loaders as any other.",
    "report": "Size and error of each layer. Connect to Preview as Text.",
    "picture": "A map of the layers and their errors. Connect to Preview Image.",
}


class NibbleQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantize",
            display_name="Nibble Quantize",
            category="Nibble/advanced",
            description=DESCRIPTION,
            search_aliases=[
                "quantization",
                "int4",
                "w4a4",
                "svdquant",
                "convrot",
                "robuq",
                "splitquant",
                "nvfp4",
                "fp4",
            ],
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
                io.Combo.Input(
                    "grid",
                    options=[INT, NVFP4],
                    default=INT,
                    optional=True,
                    advanced=True,
                    tooltip=TOOLTIPS["grid"],
                ),
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
        method: str,
        rank: int,
        gptq: bool,
        calibration: Calibration | None = None,
        training: str = "none",
        grid: str = INT,
    ) -> io.NodeOutput:
        chosen, trained = by_name(method), preset(method, training)
        given = {k: v for k, v in (("rank", rank), ("gptq", gptq)) if hasattr(chosen.config, k)}
        # One that does not go with the method is refused; of the others the widgets' defaults are there too.
        config = chosen.configured(**given, **({} if grid == INT else {"grid": grid}))
        source = ModelSource(model)
        made = quantize_model(model, source, chosen, config, calibration, trained)
        title = f"{source.family.title}, {chosen.title}"
        picture, missing = chart(made.rows, source.shapes, title, made.paths)
        notes = [*made.notes, *made.lines, *missing]
        text = quantization_text(made.rows, title, notes, made.paths, source.shapes)
        return io.NodeOutput(made.model, text, picture)
