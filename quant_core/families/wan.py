"""Wan 2.1 and 2.2, text to video and image to video, at 1.3B, 5B and 14B; and VACE, which has a second list
of blocks beside.

Source: the Wan team's reference model. Self-attention, cross-attention to the text (2.1's image to video also
to an image, `k_img` and `v_img`), GELU MLP; the blocks' modulation is a table. The embedders of patches,
text, time and image and the head stay in 16 bit. `time_projection`, which runs once a step for all blocks,
and what relatives have beside (HuMo, S2V, Animate, WanDancer) are left to the rules behind the map.
"""

from dataclasses import replace

from .base import Family, Rule, Stacked, count, renamed

_TOP = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
_LONE = {
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    **{
        f"{ours}.{a}": f"{theirs}.{b}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}


def _diffusers(shapes):
    out = renamed(_TOP) | {ours: Stacked((theirs,)) for ours, theirs in _LONE.items()}
    for stem in ("blocks", "vace_blocks"):
        for p in (f"{stem}.{i}." for i in range(count(shapes, stem))):
            out[f"{p}modulation"] = Stacked((f"{p}scale_shift_table",))
            out |= renamed(_BLOCK, p, p)
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


WAN = Family(
    name="wan",
    title="Wan 2.1 and 2.2",
    block=r"blocks\.\d+",
    rules=(
        Rule(r"before_proj"),
        Rule(r"self_attn\.q"),
        Rule(r"self_attn\.[kv]", shared_input="{block}.self_attn.q"),
        Rule(r"self_attn\.o"),
        Rule(r"cross_attn\.q"),
        # Every block's keys and values come from the same embedded text, and the same embedded image: one set
        # of statistics each.
        Rule(r"cross_attn\.[kv]", shared_input="{first}.cross_attn.k"),
        Rule(r"cross_attn\.[kv]_img", shared_input="{first}.cross_attn.k_img"),
        Rule(r"cross_attn\.o"),
        Rule(r"ffn\.0"),
        Rule(r"ffn\.2", split="gelu"),
        Rule(r"after_proj"),
    ),
    signature=("head.modulation", "blocks.0.self_attn.q.weight", "patch_embedding.weight"),
    diffusers_signature=(
        "condition_embedder.time_proj.weight",
        "blocks.0.attn1.to_q.weight",
        "blocks.0.scale_shift_table",
    ),
    diffusers=_diffusers,
    diffusers_class="WanTransformer3DModel",
)

WAN_VACE = replace(
    WAN,
    name="wan_vace",
    title="Wan VACE",
    block=r"(?:vace_)?blocks\.\d+",
    signature=("vace_blocks.0.self_attn.q.weight", *WAN.signature),
    diffusers_signature=("vace_blocks.0.attn1.to_q.weight", *WAN.diffusers_signature),
    diffusers_class="WanVACETransformer3DModel",
    chain=False,
)
