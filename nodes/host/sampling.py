"""A sampling as KSampler does it: what calibrating, comparing and the two pictures of the one node share."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.sample
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class Sampling:
    """How the model is sampled with.

    prompts: conditionings, taken in turn; negative: the one for guidance; latent: as KSampler takes it, its
    values are kept. seed: of the first run, each further one adds 1.
    """

    prompts: list
    negative: list
    latent: dict
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    seed: int

    def settings(self, second_moments: bool) -> dict:
        """For the header of the calibration."""
        named = {"sampler": self.sampler, "scheduler": self.scheduler, "steps": self.steps, "cfg": self.cfg}
        return named | {"second_moments": second_moments}


def latent_of(model: ModelPatcher, given: dict) -> torch.Tensor:
    """The latent of a LATENT, an empty one made to fit the model as KSampler makes it."""
    ratios = given.get("downscale_ratio_spacial"), given.get("downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, given["samples"], *ratios)


def sample(
    model: ModelPatcher,
    sampling: Sampling,
    latent: torch.Tensor,
    run: int = 0,
    steps: int | None = None,
    callback: Callable | None = None,
    batch_index: list[int] | None = None,
    noise_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents of one run, whose number chooses the prompt and is added to the seed. latent: of `latent_of`;
    steps: those of `sampling` where not given."""
    seed = sampling.seed + run
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed, batch_index),
        sampling.steps if steps is None else steps,
        sampling.cfg,
        sampling.sampler,
        sampling.scheduler,
        sampling.prompts[run % len(sampling.prompts)],
        sampling.negative,
        latent,
        noise_mask=noise_mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
