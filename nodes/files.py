"""Nibble Save Model and Nibble Load Diffusion Model."""

from pathlib import Path

import comfy.model_management
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..quant_core.convert.inspect import brief
from ..quant_core.formats import nibble
from ..quant_core.run.report import file_storage
from .host.build import load
from .host.saving import free_path, require_savable, save_model

SAVE_DESCRIPTION = (
    "Writes a model quantized by Nibble to one safetensors file, for Nibble Load Diffusion Model."
)
SAVE_TOOLTIPS = {
    "model": "A model quantized by Nibble. LoRAs on it go through Nibble Bake LoRA first.",
    "filename_prefix": (
        "Folder and name within the output folder. Files in output/diffusion_models can be loaded at once."
    ),
    "base3": (
        "Ternary weights take 1.6 instead of 2 bits in the file. Memory stays the same; versions before 0.4 "
        "cannot read it."
    ),
}
SAVE_OUTPUT_TOOLTIPS = {
    "path": "Where the file is.",
}


class NibbleSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleSaveModel",
            display_name="Nibble Save Model",
            category="Nibble/files",
            description=SAVE_DESCRIPTION,
            search_aliases=["save 4bit", "save quantized model", "save checkpoint", "save int4"],
            inputs=[
                io.Model.Input("model", tooltip=SAVE_TOOLTIPS["model"]),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/nibble",
                    tooltip=SAVE_TOOLTIPS["filename_prefix"],
                ),
                io.Boolean.Input(
                    "base3", default=False, optional=True, advanced=True, tooltip=SAVE_TOOLTIPS["base3"]
                ),
            ],
            outputs=[io.String.Output("path", tooltip=SAVE_OUTPUT_TOOLTIPS["path"])],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, filename_prefix: str, base3: bool = False) -> io.NodeOutput:
        require_savable(model, "Nibble Save Model")
        path = free_path(filename_prefix)
        save_model(model, path, base3)
        text = f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB\n{file_storage(nibble.PackFile(path))}"
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))


LOAD_DESCRIPTION = (
    "Loads a quantized model: this pack's files, ComfyUI's and comfy-kitchen's 4 and 8-bit formats, fp8 as "
    "int8, and nunchaku's INT4 and NVFP4."
)
LOAD_TOOLTIPS = {
    "model_name": (
        "A file from the diffusion_models folders, output/diffusion_models included. Of a nunchaku folder "
        "either of its two files."
    ),
}
LOAD_OUTPUT_TOOLTIPS = {
    "model": "The quantized model; takes samplers and LoRA loaders as any other.",
}


class NibbleLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoadDiffusionModel",
            display_name="Nibble Load Diffusion Model",
            category="Nibble",
            description=LOAD_DESCRIPTION,
            search_aliases=[
                "nunchaku",
                "load nunchaku",
                "nunchaku loader",
                "load 4bit",
                "load 4-bit",
                "load int4",
                "load svdquant",
                "load quantized model",
                "unet loader",
                "convrot",
                "kitchen",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip=LOAD_TOOLTIPS["model_name"],
                )
            ],
            outputs=[io.Model.Output("model", tooltip=LOAD_OUTPUT_TOOLTIPS["model"])],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str) -> int | str:
        path = folder_paths.get_full_path("diffusion_models", model_name)
        return Path(path).stat().st_mtime_ns if path else model_name

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        model = load(path)
        found, lines = brief(path, comfy.model_management.get_torch_device())
        said = "\n".join([f"{found.word}: {found.sentence}.", *lines])
        return io.NodeOutput(model, ui={"text": (said,), "nibble_level": (found.level,)})
