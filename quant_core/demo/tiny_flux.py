"""The small trained FLUX outside ComfyUI: diffusers' model class fed from ComfyUI's key names, and an Euler sampler."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from . import pictures

HIDDEN = 256
DOUBLE_BLOCKS = 1
SINGLE_BLOCKS = 2
HEAD_DIM = 128
LATENT_SIDE = pictures.SIZE // pictures.PATCH
CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny_flux.safetensors"


def build():
    """An empty `diffusers.FluxTransformer2DModel` of the small model's size."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * pictures.LATENT_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HIDDEN // HEAD_DIM,
        joint_attention_dim=pictures.TEXT_DIM,
        pooled_projection_dim=pictures.TEXT_DIM,
    )


def _name_map():
    """ComfyUI name -> diffusers names whose rows it stacks, for every linear and norm of the model."""
    names = {
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
        "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
        "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
        "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    }
    for i in range(DOUBLE_BLOCKS):
        c, d = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        for stream, norm, ff, qkv, out, q_norm in (
            ("img", "norm1", "ff", ("to_q", "to_k", "to_v"), "to_out.0", "norm_{}"),
            ("txt", "norm1_context", "ff_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_{}"),
        ):
            names[f"{c}{stream}_mod.lin"] = [f"{d}{norm}.linear"]
            names[f"{c}{stream}_attn.qkv"] = [f"{d}attn.{n}" for n in qkv]
            names[f"{c}{stream}_attn.proj"] = [f"{d}attn.{out}"]
            names[f"{c}{stream}_mlp.0"] = [f"{d}{ff}.net.0.proj"]
            names[f"{c}{stream}_mlp.2"] = [f"{d}{ff}.net.2"]
            for k, comfy in (("q", "query"), ("k", "key")):
                names[f"{c}{stream}_attn.norm.{comfy}_norm"] = [f"{d}attn.{q_norm.format(k)}"]
    for i in range(SINGLE_BLOCKS):
        c, d = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        names[f"{c}linear1"] = [f"{d}attn.{n}" for n in ("to_q", "to_k", "to_v")] + [f"{d}proj_mlp"]
        names[f"{c}linear2"] = [f"{d}proj_out"]
        names[f"{c}modulation.lin"] = [f"{d}norm.linear"]
        names[f"{c}norm.query_norm"], names[f"{c}norm.key_norm"] = [f"{d}attn.norm_q"], [f"{d}attn.norm_k"]
    return names


def to_diffusers(state_dict: dict) -> dict:
    """ComfyUI's keys -> diffusers' keys: fused rows split, the final layer's shift and scale swapped."""
    out = {}
    for comfy, targets in _name_map().items():
        if f"{comfy}.scale" in state_dict:
            out[f"{targets[0]}.weight"] = state_dict[f"{comfy}.scale"]
            continue
        for leaf in ("weight", "bias"):
            value = state_dict[f"{comfy}.{leaf}"]
            if comfy == "final_layer.adaLN_modulation.1":
                value = torch.cat(value.chunk(2)[::-1])
            sizes = [HIDDEN, HIDDEN, HIDDEN, value.shape[0] - 3 * HIDDEN] if len(targets) == 4 else [value.shape[0] // len(targets)] * len(targets)
            out.update({f"{t}.{leaf}": v for t, v in zip(targets, value.split(sizes), strict=True)})
    return out


def from_diffusers(state_dict: dict) -> dict:
    """The inverse of `to_diffusers`."""
    out = {}
    for comfy, sources in _name_map().items():
        if f"{sources[0]}.bias" not in state_dict:
            out[f"{comfy}.scale"] = state_dict[f"{sources[0]}.weight"]
            continue
        for leaf in ("weight", "bias"):
            value = torch.cat([state_dict[f"{s}.{leaf}"] for s in sources])
            out[f"{comfy}.{leaf}"] = torch.cat(value.chunk(2)[::-1]) if comfy == "final_layer.adaLN_modulation.1" else value
    return out


def load(state_dict: dict | None = None):
    """The trained model in fp32, in eval mode. `state_dict` (ComfyUI's keys) replaces the shipped checkpoint."""
    if state_dict is None:
        state_dict = load_file(CHECKPOINT)
    model = build()
    model.load_state_dict({k: v.float() for k, v in to_diffusers(state_dict).items()})
    return model.eval().requires_grad_(False)


def _image_ids(side):
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None]
    return ids.reshape(-1, 3)


def predict(model, latents, timestep, context, pooled):
    """The flow velocity (noise - picture). latents (B, 16, h, w), timestep (B,) in [0, 1] -> (B, 16, h, w)."""
    b, c, h, w = latents.shape
    tokens = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
    out = model(
        hidden_states=tokens,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=timestep,
        img_ids=_image_ids(h // 2),
        txt_ids=torch.zeros(context.shape[1], 3),
        return_dict=False,
    )[0]
    return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def encode_captions(captions):
    """Captions -> (context (B, 8, 128), pooled (B, 128))."""
    context, pooled = zip(*(pictures.encode_caption(c) for c in captions), strict=True)
    return torch.stack(context), torch.stack(pooled)


@torch.no_grad()
def sample(model, captions, steps=20, seed=0, on_step=None):
    """Euler sampling of the flow from seeded noise, one picture per caption -> latents (B, 16, 16, 16)."""
    context, pooled = encode_captions(captions)
    shape = (len(captions), pictures.LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(1, 0, steps + 1)
    for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        if on_step is not None:
            on_step(step, t.item())
        x = x + (t_next - t) * predict(model, x, t.expand(len(captions)), context, pooled)
    return x
