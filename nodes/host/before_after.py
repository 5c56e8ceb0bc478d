"""One picture of a model and of what was made of it, from one prompt and one seed."""

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

from .decoding import decoded
from .inherited import uncompiled
from .previews import Previews
from .progress import Shown
from .sampling import Sampling, sample


def sampled(model: ModelPatcher, sampling: Sampling, what: str) -> torch.Tensor:
    """Latents of the first prompt at the seed. what: said on the node, "Before" or "After"."""
    latent = comfy.sample.fix_empty_latent_channels(model, sampling.latent["samples"])
    shown, previews = Shown(what, "steps"), Previews(model)
    shown.begin(sampling.steps)
    seen = lambda step, x0, x, total: shown.add(1, previews.of(0, x0))
    return sample(uncompiled(model), sampling, latent, callback=seen)


def pictures(latents: list[torch.Tensor], model: ModelPatcher, vae: VAE | None) -> torch.Tensor:
    """(len(latents), H, W, 3) in 0..1: decoded by the VAE, else roughly. Of a video the frame in the
    middle."""
    return torch.stack([_one(decoded(latent, model, vae)[0]) for latent in latents])


def _one(picture):
    """(H, W, 3), or the middle one of (T, H, W, 3)."""
    return picture[len(picture) // 2] if picture.ndim == 4 else picture
