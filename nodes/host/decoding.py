"""Latents as pictures: by a VAE, or roughly."""

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE


def plain(latent: torch.Tensor) -> torch.Tensor:
    """The picture's part of a latent, where it has sound beside it."""
    return latent.tensors[0] if latent.is_nested else latent


def decoded(latent: torch.Tensor, model: ModelPatcher, vae: VAE | None) -> torch.Tensor:
    """Pictures (B, H, W, 3), or videos (B, T, H, W, 3), fp32 in [0, 1], on the CPU. vae: None for `rough`."""
    pictures = rough(plain(latent), model) if vae is None else vae.decode(plain(latent))
    pictures = pictures[..., :3].float().cpu().clamp(0, 1)
    # A video model's VAE gives one picture as a video of one frame.
    return pictures[:, 0] if pictures.ndim == 5 and pictures.shape[1] == 1 else pictures


def rough(latent: torch.Tensor, model: ModelPatcher) -> torch.Tensor:
    """Pictures (B, H, W, 3) or videos (B, T, H, W, 3) by the factors that ComfyUI draws its previews with, as
    large as a VAE would make them; grey where a model has no such factors."""
    form = model.get_model_object("latent_format")
    x = form.process_in(latent).float().cpu()
    if form.latent_rgb_factors_reshape is not None:
        x = form.latent_rgb_factors_reshape(x)
    x = x.movedim(1, -1)
    if form.latent_rgb_factors is None:
        colours = x.mean(-1, keepdim=True).expand(*x.shape[:-1], 3) / 2
    else:
        bias = form.latent_rgb_factors_bias
        bias = None if bias is None else torch.tensor(bias).float()
        colours = torch.nn.functional.linear(x, torch.tensor(form.latent_rgb_factors).float().T, bias)
    height, width = (form.spacial_downscale_ratio * size for size in latent.shape[-2:])
    frames = colours.reshape(-1, *colours.shape[-3:]).movedim(-1, 1)
    large = comfy.utils.common_upscale(frames, width, height, "bicubic", "disabled").movedim(1, -1)
    return ((large + 1) / 2).clamp(0, 1).reshape(*colours.shape[:-3], height, width, 3)
