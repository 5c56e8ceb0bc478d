"""Nibble Allocate Bits."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..quant_core.calibration.file import Calibration
from ..quant_core.calibration.gains import SAMPLES, STEPS
from ..quant_core.precision.allocate import parse_budget
from ..quant_core.precision.menu import MENUS, MixedConfig
from ..quant_core.precision.menu import menu as menu_of
from ..quant_core.precision.plot import pixels
from ..quant_core.precision.report import summary_lines, table_lines
from ..quant_core.run.report import quantization_text
from .host.allocating import NAME, allocated_model
from .host.source import ModelSource
from .host.types import CalibrationType

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
        "6.5GB or 600MB: size of the whole file. A3: 3 activation bits on average. W2.5: weight bits on "
        "average. 0.8x or 80%: computing cost beside all layers in 8 bit (all in 4 bit is 0.5x)."
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
            category="Nibble/advanced",
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
        made, done = allocated_model(model, source, calibration, asked, config, use_gains)
        picture, missing = pixels(done)
        notes = [
            "",
            *summary_lines(done),
            *made.notes,
            GAINS_NOTE if use_gains else NO_GAINS_NOTE,
            *made.lines,
            *missing,
        ]
        title = f"{source.family.title}, {NAME}, menu {menu}"
        text = [quantization_text(made.rows, title, notes, made.paths, source.shapes), "", *table_lines(done)]
        return io.NodeOutput(made.model, "\n".join(text), picture)
