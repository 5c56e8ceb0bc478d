"""Qwen-Image and its edit and layered versions: MM-DiT of 60 two-stream blocks.

Source: Qwen's reference model, whose key names ComfyUI and diffusers both keep. As in FLUX.1: modulation
weight-only, embedders and final layer in 16 bit.
"""

from .base import Family, Rule, Stacked

_SIGNATURE = (
    "transformer_blocks.0.img_mod.1.weight",
    "transformer_blocks.0.img_mlp.net.0.proj.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    "txt_norm.weight",
)
# Text first, and the first that fits counts.
_STREAMS = (
    r"(?:txt_|attn\.add_|attn\.to_add_out)",
    r"(?:img_|attn\.to_)",
)

QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    block=r"transformer_blocks\.\d+",
    rules=(
        # All of them read SiLU of the one vector of time.
        Rule(r"(img|txt)_mod\.1", weight_only=True, shared_input="transformer_blocks.0.img_mod.1"),
        Rule(r"attn\.to_q"),
        Rule(r"attn\.to_[kv]", shared_input="{block}.attn.to_q"),
        Rule(r"attn\.add_q_proj"),
        Rule(r"attn\.add_[kv]_proj", shared_input="{block}.attn.add_q_proj"),
        Rule(r"attn\.to_out\.0"),
        Rule(r"attn\.to_add_out"),
        Rule(r"(img|txt)_mlp\.net\.0\.proj"),
        Rule(r"(img|txt)_mlp\.net\.2", split="gelu"),
    ),
    signature=_SIGNATURE,
    diffusers_signature=_SIGNATURE,
    diffusers=lambda shapes: {key: Stacked((key,)) for key in shapes},
    diffusers_class="QwenImageTransformer2DModel",
    streams=_STREAMS,
    diffusers_streams=_STREAMS,
)
