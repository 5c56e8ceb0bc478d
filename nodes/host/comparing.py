"""The same sampling with several models, and its pictures."""

import time
from dataclasses import dataclass

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

from ...quant_core.charts.summary import amount
from .build import ATTACHMENT
from .decoding import decoded, plain
from .patcher import NibblePatcher
from .previews import Previews
from .sampling import Sampling, latent_of, sample

NAME = "Nibble Compare"
LETTERS = "ABC"


@dataclass(frozen=True)
class Sampled:
    """name: for people; latents: as KSampler gives them, on the CPU; pictures: (B, H, W, 3), or (B, T, H, W,
    3) of videos, in [0, 1]; seconds: of the sampling, with the loading of the model."""

    name: str
    latents: torch.Tensor
    pictures: torch.Tensor
    seconds: float


def sampled(models: list[ModelPatcher], sampling: Sampling, vae: VAE | None) -> list[Sampled]:
    """One model after another, so that memory holds what ComfyUI lets stay; decoded when all have sampled.

    vae: None for ComfyUI's own rough preview of latents. Raises ValueError for models whose latents are not
    of one kind.
    """
    require_alike(models)
    # Without a text on the node, which would take the place of the picture there.
    bar = comfy.utils.ProgressBar(sampling.steps * len(models))
    runs = [_sample(model, sampling, bar) for model in models]
    return [
        Sampled(name, latent, decoded(latent, models[0], vae), seconds)
        for name, (latent, seconds) in zip(names_of(models), runs, strict=True)
    ]


def require_alike(models: list[ModelPatcher]) -> None:
    """Raises ValueError naming the input whose latents are of another kind than those of model_a."""
    kind = lambda model: type(model.get_model_object("latent_format")).__name__
    for letter, model in zip(LETTERS, models, strict=False):
        if kind(model) != kind(models[0]):
            raise ValueError(
                f"{NAME}: the latents of 'model_{letter.lower()}' are of the kind {kind(model)}, those of "
                f"'model_a' of {kind(models[0])}. Connect versions of one model."
            )


def names_of(models: list[ModelPatcher]) -> list[str]:
    """E.g. "A: bfloat16, 23.8 GB", "B: svdquant_r, 6.8 GB"."""
    names = []
    for letter, model in zip(LETTERS, models, strict=False):
        if isinstance(model, NibblePatcher):
            kind = model.attachments[ATTACHMENT]["provenance"].get("method", "quantized")
        else:
            kind = str(model.model_dtype()).removeprefix("torch.")
        names.append(f"{letter}: {kind}, {amount(model.model_size())}")
    return names


def _sample(model, sampling: Sampling, bar: comfy.utils.ProgressBar) -> tuple[torch.Tensor, float]:
    latent, given = latent_of(model, sampling.latent), sampling.latent
    previews, started = Previews(model), time.perf_counter()
    seen = lambda step, x0, x, total: bar.update_absolute(bar.current + 1, preview=previews.of(0, x0))
    more = {name: given.get(name) for name in ("batch_index", "noise_mask")}
    samples = sample(model, sampling, latent, callback=seen, **more)
    return plain(samples).cpu(), time.perf_counter() - started
