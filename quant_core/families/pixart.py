"""PixArt-alpha and PixArt-Sigma: self-attention, cross-attention to the text, GELU MLP; one adaLN for all
blocks.

`t_block` (adaLN-single) runs once a step for all blocks; it is left to the rules behind the map, which take
it with a calibration. The embedders and the final layer stay in 16 bit.
"""

from .base import Family, Rule, Stacked, count, renamed

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def _diffusers(shapes):
    out = {"final_layer.scale_shift_table": Stacked(("scale_shift_table",))} | renamed(_TOP)
    for i in range(count(shapes, "transformer_blocks")):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        out[f"{ours}scale_shift_table"] = Stacked((f"{theirs}scale_shift_table",))
        out |= renamed(_BLOCK, ours, theirs)
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


PIXART = Family(
    name="pixart",
    title="PixArt-alpha and PixArt-Sigma",
    block=r"blocks\.\d+",
    rules=(
        Rule(r"attn\.qkv"),
        Rule(r"attn\.proj"),
        Rule(r"cross_attn\.q_linear"),
        # Every block's text keys and values come from the same embedded text: one set of statistics for all.
        Rule(r"cross_attn\.kv_linear", shared_input="blocks.0.cross_attn.kv_linear"),
        Rule(r"cross_attn\.proj"),
        Rule(r"mlp\.fc1"),
        Rule(r"mlp\.fc2", split="gelu"),
    ),
    signature=("blocks.0.cross_attn.q_linear.weight", "blocks.0.scale_shift_table", "t_block.1.weight"),
    diffusers_signature=(
        "transformer_blocks.0.scale_shift_table",
        "adaln_single.linear.weight",
        "pos_embed.proj.weight",
    ),
    diffusers=_diffusers,
    diffusers_class="PixArtTransformer2DModel",
)
