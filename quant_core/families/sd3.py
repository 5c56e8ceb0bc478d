"""Stable Diffusion 3 and 3.5, medium and large: MM-DiT; some blocks of 3.5 medium attend to the image a
second time (`attn2`).

Source: Stability's reference model, as in ComfyUI (`MMDiT`). As in FLUX.1: modulation weight-only, embedders
and final layer in 16 bit. The last block reads the text and leaves it as it is: its text modulation has two
rows a channel instead of six, which diffusers keeps in the other order, and stays in 16 bit (0.4% of 3.5
large's modulation).
"""

from .base import Family, Rule, Stacked, count, renamed

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


def _diffusers(shapes):
    out = renamed(_TOP) | {"pos_embed": Stacked(("pos_embed.pos_embed",))}
    depth = count(shapes, "transformer_blocks")
    for i in range(depth):
        out |= renamed(_BLOCK, f"joint_blocks.{i}.", f"transformer_blocks.{i}.")
    swapped = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
    swapped[f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"] = (
        f"transformer_blocks.{depth - 1}.norm1_context.linear"
    )
    out |= {k: Stacked(s.keys, swap_halves=True) for k, s in renamed(swapped).items()}
    return {k: s for k, s in out.items() if s.keys[0] in shapes}


_STREAMS = (r"context_block\.", r"x_block\.")

SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    block=r"joint_blocks\.\d+",
    rules=(
        # All of them read SiLU of the one vector of time and pooled text.
        Rule(
            r"context_block\.adaLN_modulation\.1",
            weight_only=True,
            shared_input="joint_blocks.0.x_block.adaLN_modulation.1",
            rows=6,
        ),
        Rule(
            r"x_block\.adaLN_modulation\.1",
            weight_only=True,
            shared_input="joint_blocks.0.x_block.adaLN_modulation.1",
        ),
        Rule(r"(context|x)_block\.attn\.qkv"),
        Rule(r"x_block\.attn2\.qkv"),
        Rule(r"(context|x)_block\.attn\.proj"),
        Rule(r"x_block\.attn2\.proj"),
        Rule(r"(context|x)_block\.mlp\.fc1"),
        Rule(r"(context|x)_block\.mlp\.fc2", split="gelu"),
    ),
    kept=(
        (
            r"joint_blocks\.\d+\.context_block\.adaLN_modulation\.1",
            "its rows are in another order in diffusers",
        ),
    ),
    signature=(
        "joint_blocks.0.x_block.attn.qkv.weight",
        "joint_blocks.0.context_block.attn.qkv.weight",
        "x_embedder.proj.weight",
    ),
    diffusers_signature=(
        "transformer_blocks.0.attn.add_q_proj.weight",
        "transformer_blocks.0.norm1_context.linear.weight",
        "pos_embed.proj.weight",
    ),
    diffusers=_diffusers,
    diffusers_class="SD3Transformer2DModel",
    streams=_STREAMS,
    diffusers_streams=_STREAMS,
)
