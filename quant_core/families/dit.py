"""DiT (Peebles, Xie, 2023; DiT-XL/2 is the model of RobuQ's paper), as diffusers' DiTTransformer2DModel has
it; ComfyUI has no such model.

Self-attention and a GELU MLP; each block has an adaLN-Zero of its own, with its own copy of the embedders of
time and class. The modulation reads one vector a picture: weight-only, as RobuQ keeps it at 4 bits. Embedders
and the final layer stay in 16 bit.
"""

from .base import Family, Rule, Stacked

_SIGNATURE = (
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    "proj_out_1.weight",
    "pos_embed.proj.weight",
)

DIT = Family(
    name="dit",
    title="DiT",
    block=r"transformer_blocks\.\d+",
    rules=(
        Rule(r"norm1\.linear", weight_only=True),
        Rule(r"attn1\.to_q"),
        Rule(r"attn1\.to_[kv]", shared_input="{block}.attn1.to_q"),
        Rule(r"attn1\.to_out\.0"),
        Rule(r"ff\.net\.0\.proj"),
        Rule(r"ff\.net\.2", split="gelu"),
    ),
    signature=_SIGNATURE,
    diffusers_signature=_SIGNATURE,
    diffusers=lambda shapes: {key: Stacked((key,)) for key in shapes},
    diffusers_class="DiTTransformer2DModel",
    comfyui=False,
)
