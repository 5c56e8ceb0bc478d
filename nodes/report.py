"""Nibble Report."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..quant_core.calibration.file import Calibration
from ..quant_core.charts.style import THEMES
from ..quant_core.run.chart import OVERVIEW, SHOWN, chart
from ..quant_core.run.tables import csv_text, markdown
from .host.reporting import NAME, reported, steps_section
from .host.types import CalibrationType

DESCRIPTION = (
    "Shows what quantization did to each layer: a map of errors, bits, sizes and kernels, a verdict, the "
    "worst layers and what to do about them."
)
TOOLTIPS = {
    "model": "A model quantized by Nibble: from Nibble Quantize, Guard or Load Diffusion Model.",
    "show": "overview: verdict, errors, bits and the worst layers. all: sizes and kernels too. Or one map.",
    "theme": "dark fits ComfyUI, light fits a page.",
    "calibration": "With original: measures the error over the steps of a sampling, a minute or two.",
    "original": "With calibration: the full-precision model that the other one was made from.",
}
OUTPUT_TOOLTIPS = {
    "picture": "The map. Connect to Save Image to keep it.",
    "markdown": "Verdict and tables. Connect to Preview as Text and switch it to Markdown.",
    "csv": "All layers with all their numbers, for a spreadsheet.",
}


class NibbleReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleReport",
            display_name=NAME,
            category="Nibble",
            description=DESCRIPTION,
            search_aliases=[
                "heat map",
                "error",
                "sqnr",
                "layers",
                "bits",
                "quality",
                "verdict",
                "memory of each layer",
            ],
            inputs=[
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                io.Combo.Input("show", options=list(SHOWN), default=OVERVIEW, tooltip=TOOLTIPS["show"]),
                io.Combo.Input("theme", options=list(THEMES), default="dark", tooltip=TOOLTIPS["theme"]),
                CalibrationType.Input("calibration", optional=True, tooltip=TOOLTIPS["calibration"]),
                io.Model.Input("original", optional=True, tooltip=TOOLTIPS["original"]),
            ],
            outputs=[
                io.Image.Output("picture", tooltip=OUTPUT_TOOLTIPS["picture"]),
                io.String.Output("markdown", tooltip=OUTPUT_TOOLTIPS["markdown"]),
                io.String.Output("csv", tooltip=OUTPUT_TOOLTIPS["csv"]),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        show: str,
        theme: str,
        calibration: Calibration | None = None,
        original: ModelPatcher | None = None,
    ) -> io.NodeOutput:
        if (calibration is None) != (original is None):
            missing, there = ("original", "calibration") if original is None else ("calibration", "original")
            raise ValueError(
                f"{NAME}: '{there}' is connected and '{missing}' is not. The error over the steps needs "
                f"both: connect {missing} too, or take {there} off."
            )
        found = reported(model)
        more = []
        if calibration is not None and original is not None:
            more = [steps_section(found, model, original, calibration)]
        picture, notes = chart(
            found.rows, found.shapes, found.title, found.paths, show, THEMES[theme], more=more
        )
        if not more:
            notes = [*notes, "Not shown: the error over the steps, which needs calibration and original."]
        text = markdown(found.rows, found.shapes, found.title, notes)
        return io.NodeOutput(
            picture, text, csv_text(found.rows, found.paths), ui=ui.PreviewImage(picture, cls=cls)
        )
