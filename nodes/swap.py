"""Nibble Swap Blocks."""

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..quant_core.families.select import SelectionError, modules_of, select
from .host.contents import take_apart
from .host.patcher import NibblePatcher
from .host.swapping import NAME, report_text, require_same_architecture, swap

DESCRIPTION = (
    "Takes some blocks or layers of a model from another one of the same architecture, to find out which of "
    "them quantization hurts."
)
TOOLTIPS = {
    "model_a": "The model to start from; sampling settings and all that is not swapped come from it.",
    "model_b": (
        "The model that the chosen blocks come from. One of the two is quantized by Nibble, the other as "
        "well or in full precision."
    ),
    "blocks": (
        "What to take from model_b, one a line or with ; between: 'double 0-3', 'single 5,7,9', 'blocks 2', "
        "module names with *, such as '*.mlp' or '*linear2', or 'all'."
    ),
}
OUTPUT_TOOLTIPS = {
    "model": "A new model; both inputs stay as they are. Takes samplers, LoRA loaders and Nibble Save Model.",
    "report": "What came from which model, and how large the result is. Connect to Preview as Text.",
}


class NibbleSwapBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleSwapBlocks",
            display_name=NAME,
            category="Nibble/advanced",
            description=DESCRIPTION,
            search_aliases=["swap", "mix", "merge", "ablation", "sensitivity", "which block"],
            inputs=[
                io.Model.Input("model_a", tooltip=TOOLTIPS["model_a"]),
                io.Model.Input("model_b", tooltip=TOOLTIPS["model_b"]),
                io.String.Input("blocks", default="double 0", multiline=True, tooltip=TOOLTIPS["blocks"]),
            ],
            outputs=[
                io.Model.Output("model", tooltip=OUTPUT_TOOLTIPS["model"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
            ],
        )

    @classmethod
    def execute(cls, model_a: ModelPatcher, model_b: ModelPatcher, blocks: str) -> io.NodeOutput:
        if not any(isinstance(m, NibblePatcher) for m in (model_a, model_b)):
            raise ValueError(
                f"{NAME}: neither model is quantized by Nibble. Connect at least one from Nibble Quantize or "
                "Nibble Load Diffusion Model; ComfyUI's ModelMerge nodes mix full-precision models."
            )
        for which, model in (("model_a", model_a), ("model_b", model_b)):
            if model.injections:
                raise ValueError(
                    f"{NAME}: {which} has injections ({', '.join(model.injections)}), which hold on to its "
                    f"own layers. Put the node that makes them, such as a bypass LoRA loader, behind {NAME}."
                )
        # ComfyUI runs nodes under inference mode, whose tensors no later LoRA or training could touch.
        with torch.inference_mode(False), torch.no_grad():
            a, b = take_apart(model_a), take_apart(model_b)
            require_same_architecture(a.shapes, b.shapes)
            try:
                chosen = select(blocks, modules_of(a.shapes))
            except SelectionError as error:
                raise SelectionError(f"{NAME}, blocks: {error}") from error
            swapped = swap(a, b, chosen)
            return io.NodeOutput(swapped, report_text(a, b, chosen, swapped))
