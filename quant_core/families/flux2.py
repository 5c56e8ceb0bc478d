"""FLUX.2 (dev, Klein 4B and 9B): two-stream blocks, then one-stream blocks, whose modulation all blocks of a
kind share.

Source: Black Forest Labs' reference model. Gated MLPs: the first half of `mlp.0` and of what `linear1` has
behind q, k and v passes a SiLU, in ComfyUI's and in diffusers' order, and `mlp.2` reads a product, no GELU.
`linear2` is quantized as its attention and MLP halves, as in FLUX.1. The three shared modulation layers are
weight-only, as FLUX.1's: 1.8 % of dev's weights, 3.7 % of Klein 4B's. In a small random model (hidden 256)
they move the latents' error from 0.252 to 0.263 with a calibration, from 0.289 to 0.368 without.
"""

from .base import Family, Rule, Stacked, count, renamed

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_BLOCKS = (
    ("double_blocks", "transformer_blocks", _DOUBLE, _DOUBLE_NORMS),
    ("single_blocks", "single_transformer_blocks", _SINGLE, _SINGLE_NORMS),
)


def _diffusers(shapes):
    out = renamed(_TOP)
    for leaf in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = Stacked(
            (f"norm_out.linear.{leaf}",), swap_halves=True
        )
    for ours, theirs, linears, norms in _BLOCKS:
        for i in range(count(shapes, theirs)):
            out |= renamed(linears, f"{ours}.{i}.", f"{theirs}.{i}.")
            out |= {f"{ours}.{i}.{a}.scale": Stacked((f"{theirs}.{i}.{b}.weight",)) for a, b in norms.items()}
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    block=r"(?:double|single)_blocks\.\d+",
    # All of them read SiLU of the one vector of time and guidance.
    outside=(
        Rule(
            r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin",
            weight_only=True,
            shared_input="double_stream_modulation_img.lin",
        ),
    ),
    rules=(
        Rule(r"(img|txt)_attn\.qkv"),
        Rule(r"(img|txt)_attn\.proj"),
        Rule(r"(img|txt)_mlp\.[02]"),
        Rule(r"linear1"),
        Rule(r"linear2", split="attn|mlp"),
    ),
    signature=(
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "single_stream_modulation.lin.weight",
    ),
    diffusers_signature=(
        "double_stream_modulation_img.linear.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
        "single_stream_modulation.linear.weight",
    ),
    diffusers=_diffusers,
    diffusers_class="Flux2Transformer2DModel",
    streams=("img_", "txt_"),
    diffusers_streams=("txt_", "img_"),
)
