"""How a kind of model is usually sampled, where nobody says: by ComfyUI's class of it."""

import re
from dataclasses import dataclass, replace

import torch
from comfy.model_patcher import ModelPatcher

from .origin import source_path

# In the name of a file: distilled to few steps, without guidance.
FEW_STEPS = re.compile(r"turbo|lightning|schnell|klein|hyper|distill|lcm|dmd|[248][-_ ]?steps?\b", re.I)


@dataclass(frozen=True)
class Kind:
    """side: of a square picture in pixels; frames: of a video."""

    cfg: float
    steps: int
    sampler: str = "euler"
    scheduler: str = "simple"
    side: int = 1024
    frames: int = 1


# As in ComfyUI's own templates. A class that is not here is taken for the nearest of its ancestors.
KINDS = {
    "SD15": Kind(7.0, 20, scheduler="normal", side=512),
    "SD20": Kind(7.0, 20, scheduler="normal", side=768),
    "SDXL": Kind(7.0, 24, scheduler="normal"),
    "SD3": Kind(4.5, 28, scheduler="sgm_uniform"),
    "PixArtAlpha": Kind(4.5, 20, scheduler="normal"),
    "HunyuanDiT": Kind(6.0, 24, scheduler="normal"),
    "AuraFlow": Kind(3.5, 24),
    "Flux": Kind(1.0, 20),
    "FluxSchnell": Kind(1.0, 4),
    "Flux2": Kind(1.0, 20),
    "Chroma": Kind(4.0, 26, scheduler="beta"),
    "Lumina2": Kind(4.0, 28),
    "ZImage": Kind(1.0, 9),
    "QwenImage": Kind(2.5, 20),
    "Krea2": Kind(4.0, 24),
    "Anima": Kind(4.0, 24),
    "JoyImage": Kind(4.0, 24),
    "Omnigen2": Kind(5.0, 20),
    "HiDream": Kind(5.0, 28, scheduler="normal"),
    "WAN21_T2V": Kind(6.0, 20, side=480, frames=33),
    "WAN22_T2V": Kind(5.0, 20, side=704, frames=33),
    "HunyuanVideo": Kind(1.0, 20, side=480, frames=33),
    "HunyuanImage21": Kind(3.5, 20, side=2048),
    "LTXV": Kind(3.0, 24, side=512, frames=49),
    "CosmosT2V": Kind(7.0, 24, "res_multistep", "karras", side=704, frames=33),
    "CosmosT2IPredict2": Kind(4.0, 24),
    "GenmoMochi": Kind(4.5, 24, side=480, frames=25),
}
OTHER = Kind(4.0, 20)
VIDEO = Kind(5.0, 20, side=480, frames=33)


def kind_of(model: ModelPatcher) -> Kind:
    """By the class of its config and the name of its file: turbo, lightning and their like take 8 steps at
    most and no guidance."""
    config, latents = type(model.model.model_config), model.get_model_object("latent_format")
    names = [c.__name__ for c in config.__mro__]
    video = latents.latent_dimensions == 3 and latents.temporal_downscale_ratio > 1
    found = next((KINDS[name] for name in names if name in KINDS), VIDEO if video else OTHER)
    path = source_path(model)
    if path is not None and FEW_STEPS.search(path.stem):
        found = replace(found, cfg=1.0, steps=min(found.steps, 8))
    return found


def empty_latent(model: ModelPatcher, side: int, frames: int) -> dict:
    """As EmptyLatentImage and its like give it, for a square of `side` pixels. Raises ValueError for models
    of sound or shapes, whose sizes nobody can guess."""
    latents = model.get_model_object("latent_format")
    if latents.latent_dimensions not in (2, 3):
        raise ValueError("this is no model of pictures or video: connect a latent_image of your usual size")
    cells = max(2, side // latents.spacial_downscale_ratio // 2 * 2)  # patches are of two cells
    time = [(frames - 1) // latents.temporal_downscale_ratio + 1] * (latents.latent_dimensions == 3)
    return {"samples": torch.zeros(1, latents.latent_channels, *time, cells, cells)}
