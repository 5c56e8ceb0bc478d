"""The small trained FLUX outside ComfyUI: diffusers' model class fed from ComfyUI's key names, and an Euler
sampler."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...families import FLUX
from . import pictures

HIDDEN = 256
DOUBLE_BLOCKS = 1
SINGLE_BLOCKS = 2
HEAD_DIM = 128
LATENT_SIDE = pictures.SIZE // pictures.PATCH
CHECKPOINT = Path(__file__).resolve().parents[3] / "tests" / "assets" / "tiny_flux.safetensors"


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


def to_diffusers(state_dict: dict) -> dict:
    """ComfyUI's keys -> diffusers' keys: fused rows split, the final layer's shift and scale swapped."""
    like = {k: v.shape for k, v in build().state_dict().items()}
    out: dict[str, torch.Tensor] = {}
    for key, source in FLUX.diffusers(like).items():
        out |= source.write(state_dict[key], [like[k][0] for k in source.keys])
    return out


def from_diffusers(state_dict: dict) -> dict:
    """The inverse of `to_diffusers`."""
    names = FLUX.diffusers({k: v.shape for k, v in state_dict.items()})
    return {key: source.read(state_dict.__getitem__) for key, source in names.items()}


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
    tokens = (
        latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
    )
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
def sample(model, captions, steps=20, seed=0):
    """Euler sampling of the flow from seeded noise, one picture per caption -> latents (B, 16, 16, 16)."""
    context, pooled = encode_captions(captions)
    shape = (len(captions), pictures.LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(1, 0, steps + 1)
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * predict(model, x, t.expand(len(captions)), context, pooled)
    return x
