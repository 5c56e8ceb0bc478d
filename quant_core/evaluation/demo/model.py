"""Small trained models outside ComfyUI: diffusers' model classes fed from ComfyUI's key names, and
samplers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file

from ...families import FLUX, Family
from .outliers import add_outliers
from .pictures import LATENT_CHANNELS, PATCH, TEXT_DIM

HIDDEN = 256
HEAD_DIM = 128
ASSETS = Path(__file__).resolve().parents[3] / "tests" / "assets"


@dataclass(frozen=True)
class SmallModel(ABC):
    """A small trained model and what it draws: `world` is a module with SIZE, CAPTIONS, random_scene,
    encode_caption, encode and decode; `random_judged` captions more than those named steady the figures.

    A kind of model is a subclass: its family and name, its empty model, how it is sampled and its outliers.
    """

    world: ModuleType
    checkpoint: Path
    random_judged: int
    steps: int = 20
    family: ClassVar[Family]
    kind: ClassVar[str]

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """diffusers' model of the small model's size, its weights random."""

    @abstractmethod
    def sample(self, model, captions: Sequence[str], steps: int = 20, seed: int = 0) -> torch.Tensor:
        """Deterministic sampling from seeded noise, one picture per caption -> latents that `world.decode`
        takes."""

    @abstractmethod
    def with_outliers(self, state_dict: dict, severity: float, seed: int = 0) -> dict:
        """A state dict (ComfyUI's keys) -> an equivalent one, fp32, whose activations have outliers. Severity
        0: none; 1: as in big models."""

    @property
    def judged(self) -> tuple[str, ...]:
        """The captions that figures are measured on, first those that are shown."""
        rng = np.random.default_rng(11)
        return (
            *self.world.CAPTIONS,
            *(self.world.random_scene(rng).caption for _ in range(self.random_judged)),
        )

    def to_diffusers(self, state_dict: dict) -> dict:
        """ComfyUI's keys -> diffusers' keys: fused rows split, the final layer's halves swapped where the two
        differ."""
        like = {k: v.shape for k, v in self.build().state_dict().items()}
        out: dict[str, torch.Tensor] = {}
        for key, source in self.family.diffusers(like).items():
            out |= source.write(state_dict[key], [like[k][0] for k in source.keys])
        return out

    def from_diffusers(self, state_dict: dict) -> dict:
        """The inverse of `to_diffusers`."""
        names = self.family.diffusers({k: v.shape for k, v in state_dict.items()})
        return {key: source.read(state_dict.__getitem__) for key, source in names.items()}

    def load(self, state_dict: dict | None = None):
        """The trained model in fp32, in eval mode. `state_dict` (ComfyUI's keys) replaces the shipped
        checkpoint."""
        if state_dict is None:
            state_dict = load_file(self.checkpoint)
        model = self.build()
        model.load_state_dict({k: v.float() for k, v in self.to_diffusers(state_dict).items()})
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class SmallFlux(SmallModel):
    """A small FLUX, trained on the flow from pictures to noise."""

    family, kind = FLUX, "FLUX"
    double_blocks: int = 1
    single_blocks: int = 2

    def build(self):
        """An empty `diffusers.FluxTransformer2DModel` of the small model's size."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=self.double_blocks,
            num_single_layers=self.single_blocks,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HIDDEN // HEAD_DIM,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
        )

    def with_outliers(self, state_dict, severity, seed=0):
        """Few channels stand out of the inputs of each block: `outliers.add_outliers`."""
        return add_outliers(state_dict, severity, seed)

    def encode_captions(self, captions):
        """Captions -> (context (B, tokens, 128), pooled (B, 128))."""
        context, pooled = zip(*(self.world.encode_caption(c) for c in captions), strict=True)
        return torch.stack(context), torch.stack(pooled)

    @torch.no_grad()
    def sample(self, model, captions, steps=20, seed=0):
        """Euler sampling of the flow from seeded noise, one picture per caption -> latents (B, 16, h, w)."""
        context, pooled = self.encode_captions(captions)
        side = self.world.SIZE // PATCH
        shape = (len(captions), LATENT_CHANNELS, side, side)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        times = torch.linspace(1, 0, steps + 1)
        for t, t_next in pairwise(times):
            x = x + (t_next - t) * predict(model, x, t.expand(len(captions)), context, pooled)
        return x


def image_ids(side):
    """(side^2, 3): where each token of a square picture lies, as FLUX's rotary embedding takes it."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None]
    return ids.reshape(-1, 3)


def to_tokens(latents):
    """(B, 16, h, w) -> (B, hw/4, 64): 2 x 2 latent pixels a token."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def predict(model, latents, timestep, context, pooled):
    """The flow velocity (noise - picture). latents (B, 16, h, w), timestep (B,) in [0, 1] -> (B, 16, h,
    w)."""
    b, c, h, w = latents.shape
    out = model(
        hidden_states=to_tokens(latents),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=timestep,
        img_ids=image_ids(h // 2),
        txt_ids=torch.zeros(context.shape[1], 3),
        return_dict=False,
    )[0]
    return out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
