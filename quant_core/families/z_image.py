"""Z-Image: one-stream blocks over text and image together, behind refiners of two blocks for either (three,
with SigLIP's, in Omni).

Source: Tongyi's reference model; ComfyUI runs it as a Lumina. SwiGLU MLPs: w2 reads a product, no GELU. The
refiners of text and SigLIP have no modulation. What there is reads the one vector of time and is weight-only;
embedders and final layer stay in 16 bit.
"""

from .base import Family, Rule, Stacked, count, renamed

_STEMS = ("context_refiner", "siglip_refiner", "noise_refiner", "layers")
_TOP = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{
        name: name
        for name in (
            "cap_embedder.0",
            "cap_embedder.1",
            "siglip_embedder.0",
            "siglip_embedder.1",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
        )
    },
}
_LONE = ("x_pad_token", "cap_pad_token", "siglip_pad_token")
_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    **{
        name: name
        for name in (
            "adaLN_modulation.0",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
            "attention_norm1",
            "attention_norm2",
            "ffn_norm1",
            "ffn_norm2",
        )
    },
}


def _diffusers(shapes):
    out = renamed(_TOP) | {name: Stacked((name,)) for name in _LONE}
    for stem in _STEMS:
        for i in range(count(shapes, stem)):
            out |= renamed(_BLOCK, f"{stem}.{i}.", f"{stem}.{i}.")
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    block=rf"(?:{'|'.join(_STEMS)})\.\d+",
    stems=_STEMS,
    rules=(
        Rule(r"adaLN_modulation\.0", weight_only=True, shared_input="{first}.adaLN_modulation.0"),
        Rule(r"attention\.qkv"),
        Rule(r"attention\.out"),
        Rule(r"feed_forward\.w1"),
        Rule(r"feed_forward\.w3", shared_input="{block}.feed_forward.w1"),
        Rule(r"feed_forward\.w2"),
    ),
    kept=(
        (
            r"dec_net\..+",
            "the decoder to pixels, 4.5 % of the weights: in 4 bits it doubles the picture's error",
        ),
    ),
    # Lumina 2 has the same blocks with another modulation and grouped heads.
    signature=(
        "layers.0.attention.qkv.weight",
        "layers.0.adaLN_modulation.0.weight",
        "cap_embedder.1.weight",
    ),
    diffusers_signature=(
        "layers.0.attention.to_q.weight",
        "layers.0.adaLN_modulation.0.weight",
        "all_x_embedder.2-1.weight",
    ),
    diffusers=_diffusers,
    diffusers_class="ZImageTransformer2DModel",
    chain=False,  # the refiners stand side by side
)
