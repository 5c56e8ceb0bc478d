"""Nibble Export Model."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..quant_core.convert import convert
from ..quant_core.convert.replace import AS, SMALL
from ..quant_core.formats.kitchen.native import AWQ, OLDEST
from .host.progress import steps
from .host.saving import LoadedModel, free_path, require_savable

NAME = "Nibble Export Model"

DESCRIPTION = (
    "Writes a quantized model in another format: for stock ComfyUI, comfy-kitchen or nunchaku. Says what "
    "that loses, and refuses to lose anything unless it may."
)
TOOLTIPS = {
    "model": (
        "A model from Nibble Quantize or Nibble Load Diffusion Model. With method native every layer is "
        "exact in the native format."
    ),
    "format": (
        "native: ComfyUI's Load Diffusion Model reads it without this pack. kitchen: for a ComfyUI that "
        "takes svdquant_w4a4. nunchaku: SVDQuant INT4 or NVFP4. nibble: as Nibble Save Model."
    ),
    "filename_prefix": "Folder and name within the output folder.",
    "lossy": (
        "Allow layers that the format does not have to be written otherwise. Off: such a model is refused, "
        "with the list."
    ),
    "replacement": (
        "What such layers become: int8 (twice the size, about 40 dB), 16 bit, or with comfyui 0.38 awq: "
        "weight-only layers in 4 bit without their low rank, the rest int8."
    ),
    "comfyui": (
        "The oldest ComfyUI that shall read a native or kitchen file. From 0.38 on, modulation stays in 4 "
        "bit (awq_w4a16)."
    ),
}
OUTPUT_TOOLTIPS = {
    "path": "Where the file is.",
    "report": "What was written as it was and what was replaced. Connect to Preview as Text.",
}


class NibbleExportModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleExportModel",
            display_name=NAME,
            category="Nibble/files",
            description=DESCRIPTION,
            search_aliases=["convert format", "export to nunchaku", "export native", "stock comfyui"],
            inputs=[
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                io.Combo.Input(
                    "format", options=list(convert.TARGETS), default="native", tooltip=TOOLTIPS["format"]
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/exported",
                    tooltip=TOOLTIPS["filename_prefix"],
                ),
                io.Boolean.Input("lossy", default=False, tooltip=TOOLTIPS["lossy"]),
                io.Combo.Input(
                    "replacement",
                    options=[*AS, SMALL],
                    default=AS[0],
                    advanced=True,
                    tooltip=TOOLTIPS["replacement"],
                ),
                io.Combo.Input(
                    "comfyui",
                    options=[OLDEST, AWQ],
                    default=OLDEST,
                    optional=True,
                    advanced=True,
                    tooltip=TOOLTIPS["comfyui"],
                ),
            ],
            outputs=[
                io.String.Output("path", tooltip=OUTPUT_TOOLTIPS["path"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        format: str,
        filename_prefix: str,
        lossy: bool,
        replacement: str,
        comfyui: str = OLDEST,
    ) -> io.NodeOutput:
        require_savable(model, NAME)
        path = free_path(filename_prefix)
        planned = convert.plan(LoadedModel(model, path), format, comfyui)
        text = "\n".join(convert.convert(planned, path, lossy=lossy, replacement=replacement, progress=steps))
        return io.NodeOutput(str(path), text, ui=ui.PreviewText(text))
