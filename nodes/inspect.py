"""Nibble Inspect."""

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui

from ..quant_core.convert.inspect import describe, description_text, picture_of

DESCRIPTION = (
    "Says what a model file holds, from its header: format, layers and the kernels they run on here, whether "
    "stock ComfyUI can load it, and the memory it takes."
)
TOOLTIPS = {
    "model_name": (
        "A file from the diffusion_models folders: quantized by this pack, for ComfyUI, comfy-kitchen or "
        "nunchaku, or in full precision."
    ),
}
OUTPUT_TOOLTIPS = {
    "report": "Connect to Preview as Text.",
    "picture": "A map of the layers, of a quantized file. Connect to Preview Image.",
}


class NibbleInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleInspect",
            display_name="Nibble Inspect",
            category="Nibble/files",
            description=DESCRIPTION,
            search_aliases=["model info", "header", "memory need", "file format", "what is this file"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip=TOOLTIPS["model_name"],
                )
            ],
            outputs=[
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
                io.Image.Output("picture", tooltip=OUTPUT_TOOLTIPS["picture"]),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        device = comfy.model_management.get_torch_device()
        picture, missing = picture_of(path, device)
        text = "\n".join([description_text(describe(path, device)), *missing])
        return io.NodeOutput(text, picture, ui=ui.PreviewText(text))
