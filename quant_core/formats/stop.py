"""What stops the stock loaders at a Nibble file, with a sentence that names the right node.

ComfyUI copies whatever has a fitting name and shape: 8-bit codes under `weight` became noise without an
error, 4-bit ones an error about sizes. Where a file has a whole checkpoint's prefix, its loaders look at
nothing else, so a few tensors of an empty FLUX stand there. Its first layer declares a format that ComfyUI
does not know, which is the sentence, and ComfyUI raises a KeyError with it, whatever model the rest of the
file is. Source: comfy.model_detection and comfy.ops (`comfy_quant`) of ComfyUI 0.33; 0.4 kB.
"""

import json

import torch

SENTENCE = "This file is quantized by ComfyUI-Nibble: load it with the node Nibble Load Diffusion Model"
PREFIX = "model.diffusion_model."
_SHAPES = {
    "img_in.weight": (128, 1),
    "img_in.bias": (128,),
    "txt_in.weight": (128, 1),
    "vector_in.in_layer.weight": (128, 1),
    "time_in.in_layer.weight": (128, 1),
    "double_blocks.0.img_attn.norm.key_norm.scale": (1,),
}  # more than five, or ComfyUI takes the prefix for a part of names


def tensors() -> dict[str, torch.Tensor]:
    """{key: tensor} to write beside a model's own."""
    out = {f"{PREFIX}{name}": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in _SHAPES.items()}
    out[f"{PREFIX}img_in.comfy_quant"] = torch.tensor(
        list(json.dumps({"format": SENTENCE}).encode()), dtype=torch.uint8
    )
    return out
