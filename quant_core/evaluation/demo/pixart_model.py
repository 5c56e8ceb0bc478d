"""A small trained PixArt outside ComfyUI: diffusers' model class, the noise that ComfyUI's PixArt predicts,
and Euler's sampler."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from ...families import PIXART
from .model import SmallModel
from .pictures import TEXT_DIM
from .pixart_outliers import add_outliers

HEADS, HEAD_DIM = 3, 64
WIDTH = HEADS * HEAD_DIM
CHANNELS = 4  # of a latent; the model's other four out-channels, the variance, are left unused
TIMESTEPS = 1000


@lru_cache(maxsize=1)
def log_sigmas() -> torch.Tensor:
    """(1000,) log of the noise's share over the picture's at each timestep: DDPM's linear schedule, Ho,
    Jain and Abbeel, Denoising Diffusion Probabilistic Models (2020)."""
    kept = torch.cumprod(
        1
        - torch.linspace(
            1e-4,
            2e-2,
            TIMESTEPS,
            dtype=torch.float64,
        ),
        0,
    )
    return (0.5 * torch.log((1 - kept) / kept)).float()


def sigma_at(timestep: torch.Tensor) -> torch.Tensor:
    """The sigma of timesteps in [0, 999]; between two whole ones its logarithm is interpolated."""
    table = log_sigmas()
    low = timestep.floor().long().clamp(max=TIMESTEPS - 2)
    return torch.lerp(table[low], table[low + 1], timestep - low).exp()


@dataclass(frozen=True)
class SmallPixArt(SmallModel):
    """A small PixArt-Sigma, trained to predict the noise in a picture."""

    family, kind = PIXART, "PixArt"
    blocks: int = 4

    def build(self):
        """An empty `diffusers.PixArtTransformer2DModel` of the small model's size."""
        from diffusers import PixArtTransformer2DModel

        side = self.world.SIZE // 2
        return PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=self.blocks,
            cross_attention_dim=WIDTH,
            sample_size=side,
            # ComfyUI numbers the places of a latent this small as if it were 64 wide.
            interpolation_scale=side / 64,
            use_additional_conditions=False,
            caption_channels=TEXT_DIM,
        )

    def from_diffusers(self, state_dict):
        """The inverse of `to_diffusers`, with the empty caption that ComfyUI's model has a place for."""
        empty = torch.zeros(self.world.TEXT_TOKENS, TEXT_DIM)
        return super().from_diffusers(state_dict) | {"y_embedder.y_embedding": empty}

    def with_outliers(self, state_dict, severity, seed=0):
        """Channels of many sizes, and massive tokens where the text has no word:
        `pixart_outliers.add_outliers`."""
        words, filled = self.world.vocabulary()
        return add_outliers(state_dict, severity, words, filled, seed)

    def encode_captions(self, captions):
        """Captions -> context (B, tokens, 128)."""
        return torch.stack([self.world.encode_caption(c) for c in captions])

    @torch.no_grad()
    def sample(self, model, captions, steps=20, seed=0):
        """Euler sampling over evenly spaced timesteps ("euler" and "normal" in ComfyUI) from seeded noise,
        one picture per caption -> latents (B, 4, h, w)."""
        context = self.encode_captions(captions)
        side = self.world.SIZE // 2
        noise = torch.randn(
            (len(captions), CHANNELS, side, side), generator=torch.Generator().manual_seed(seed)
        )
        times = torch.linspace(TIMESTEPS - 1, 0, steps)
        sigmas = torch.cat([sigma_at(times), torch.zeros(1)])
        x = noise * (1 + sigmas[0] ** 2).sqrt()
        for t, (sigma, after) in zip(times, pairwise(sigmas), strict=True):
            scaled = x / (1 + sigma**2).sqrt()
            x = x + (after - sigma) * predict(model, scaled, t.expand(len(captions)), context)
        return x


def predict(model, latents, timestep, context):
    """The noise in latents (B, 4, h, w) of about unit variance at timesteps (B,) -> (B, 4, h, w)."""
    out = model(hidden_states=latents, encoder_hidden_states=context, timestep=timestep, return_dict=False)[0]
    return out[:, :CHANNELS]
