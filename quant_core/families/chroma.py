"""Chroma and Chroma Radiance: FLUX's blocks without their modulation layers, which one approximator serves
instead.

Source: lodestones' Chroma as in ComfyUI and diffusers. The approximator (`distilled_guidance_layer`) runs
once a step on 344 short vectors and its errors reach every block, so it stays in 16 bit, as do the embedders
and the final layer. So does what makes the weights of Radiance's pixel decoder (6 % of its own): in a small
random model the prediction is 0.36 off without, 0.47 with it in W4A16 and 0.56 in W4A4.
"""

from .base import Family, Stacked, count, renamed
from .flux import BLOCK_RULES, blocks_from_diffusers

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
}
_APPROXIMATOR = {"in_layer": "linear_1", "out_layer": "linear_2"}


def _diffusers(shapes):
    out, p = renamed(_TOP), "distilled_guidance_layer."
    for i in range(count(shapes, f"{p}layers")):
        out |= renamed(_APPROXIMATOR, f"{p}layers.{i}.", f"{p}layers.{i}.")
        out[f"{p}norms.{i}.scale"] = Stacked((f"{p}norms.{i}.weight",))
    out |= blocks_from_diffusers(shapes)
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


CHROMA = Family(
    name="chroma",
    title="Chroma",
    block=r"(?:double|single)_blocks\.\d+",
    rules=BLOCK_RULES,
    kept=(
        (r"distilled_guidance_layer\..+", "its errors reach every block"),
        (
            r"nerf_blocks\..+",
            "makes the weights of the pixel decoder: in 4 bit the prediction is a third further off",
        ),
    ),
    signature=("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"),
    diffusers_signature=(
        "transformer_blocks.0.attn.add_q_proj.weight",
        "distilled_guidance_layer.in_proj.weight",
    ),
    diffusers=_diffusers,
    diffusers_class="ChromaTransformer2DModel",
    streams=("img_", "txt_"),
    diffusers_streams=("txt_", "img_"),
)
