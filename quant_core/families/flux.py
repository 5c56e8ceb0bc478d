"""FLUX.1 (dev, schnell, Fill, Kontext): two-stream blocks, then one-stream blocks.

Source: Black Forest Labs' reference model; the choice of what stays in 16 bit follows SVDQuant, section 5 and
deepcompressor's FLUX settings: embedders and final layer untouched, adaLN modulation weight-only, `linear2`
as its attention and MLP halves.
"""

from .base import Family, Rule, Stacked, count, renamed

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def _diffusers(shapes):
    out = renamed(_TOP)
    for leaf in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = Stacked(
            (f"norm_out.linear.{leaf}",), swap_halves=True
        )
    out |= blocks_from_diffusers(shapes)
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


def blocks_from_diffusers(shapes) -> dict[str, Stacked]:
    """The blocks' tensors, those that are not there among them."""
    out: dict[str, Stacked] = {}
    for ours, theirs, linears, norms in (
        ("double_blocks", "transformer_blocks", _DOUBLE, _DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", _SINGLE, _SINGLE_NORMS),
    ):
        for i in range(count(shapes, theirs)):
            out |= renamed(linears, f"{ours}.{i}.", f"{theirs}.{i}.")
            for comfy, other in norms.items():
                out[f"{ours}.{i}.{comfy}.scale"] = Stacked((f"{theirs}.{i}.{other}.weight",))
    return out


BLOCK_RULES = (
    Rule(r"(img|txt)_attn\.qkv"),
    Rule(r"(img|txt)_attn\.proj"),
    Rule(r"(img|txt)_mlp\.0"),
    Rule(r"(img|txt)_mlp\.2", split="gelu"),
    Rule(r"linear1"),
    Rule(r"linear2", split="attn|gelu"),
)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    block=r"(?:double|single)_blocks\.\d+",
    rules=(
        # All of them read SiLU of the one vector of time, guidance and pooled text.
        Rule(
            r"(img|txt)_mod\.lin|modulation\.lin",
            weight_only=True,
            shared_input="double_blocks.0.img_mod.lin",
        ),
        *BLOCK_RULES,
    ),
    signature=("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "double_blocks.0.img_mod.lin.weight"),
    # Chroma and FLUX.2 share the block names but not the modulation; Ovis-Image's MLPs have no GELU.
    without=(
        "distilled_guidance_layer.",
        "double_stream_modulation",
        "double_blocks.0.img_mlp.gate_proj.",
        "context_embedder_norm.",
    ),
    diffusers_signature=(
        "transformer_blocks.0.norm1_context.linear.weight",
        "x_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    ),
    diffusers=_diffusers,
    diffusers_class="FluxTransformer2DModel",
    streams=("img_", "txt_"),
    diffusers_streams=("txt_", "img_"),
)
