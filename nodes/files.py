"""Nibble Save Model and Nibble Load Diffusion Model."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..quant_core.formats import nibble
from ..quant_core.run.report import file_storage
from .host.build import ATTACHMENT, load, unpatched
from .host.saving import free_path, narrow, require_savable


class NibbleSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleSaveModel",
            display_name="Nibble Save Model",
            category="Nibble",
            description="Writes a model quantized by Nibble to one safetensors file, for Nibble Load Diffusion "
            "Model.",
            search_aliases=["save", "export", "checkpoint"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model quantized by Nibble. LoRAs on it go through Nibble Bake LoRA first.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/nibble",
                    tooltip="Folder and name within the output folder. Files in output/diffusion_models can be "
                    "loaded at once.",
                ),
                io.Boolean.Input(
                    "base3",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Ternary weights take 1.6 instead of 2 bits in the file. Memory stays the same; "
                    "versions before 0.4 cannot read it.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="Where the file is.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix, base3=False):
        require_savable(model, "Nibble Save Model")
        info = model.attachments[ATTACHMENT]
        layers, rest = unpatched(model)
        rest = {k: narrow(t) for k, t in rest.items()}
        path = free_path(filename_prefix)
        nibble.save(
            path, layers, rest, info["family"], info["provenance"], info["report"], base3, info["origin"]
        )
        text = f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB\n{file_storage(nibble.PackFile(path))}"
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))


class NibbleLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NibbleLoadDiffusionModel",
            display_name="Nibble Load Diffusion Model",
            category="Nibble",
            description="Loads a quantized model: this pack's files, ComfyUI's and comfy-kitchen's 4 and 8-bit "
            "formats, and nunchaku's INT4.",
            search_aliases=["load", "unet", "int4", "svdquant", "nunchaku", "kitchen"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file from the diffusion_models folders, output/diffusion_models included. Of a "
                    "nunchaku folder either of its two files.",
                )
            ],
            outputs=[
                io.Model.Output(
                    "model", tooltip="The quantized model; takes samplers and LoRA loaders as any other."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name):
        path = folder_paths.get_full_path("diffusion_models", model_name)
        return Path(path).stat().st_mtime_ns if path else model_name

    @classmethod
    def execute(cls, model_name):
        return io.NodeOutput(load(folder_paths.get_full_path_or_raise("diffusion_models", model_name)))
