"""Procedural captioned pictures, their latents and their text encoding: the world of the small test model.

Everything is a closed formula, so the model can be trained, sampled and judged with no download.
A picture is 64 x 64 RGB: one shape on a patterned background. Its latent (16, 16, 16) holds the 16 lowest
DCT coefficients of each 4 x 4 patch (10 luma, 3 + 3 chroma), the channel count that FLUX expects.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

SIZE = 64
PATCH = 4
LATENT_CHANNELS = 16
TEXT_TOKENS = 8
TEXT_DIM = 128

COLORS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.12, 0.65, 0.2),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.1),
    "purple": (0.55, 0.15, 0.7),
    "white": (0.95, 0.95, 0.95),
    "black": (0.06, 0.06, 0.06),
    "orange": (0.95, 0.5, 0.08),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
SIZES = {"small": 0.32, "large": 0.55}
PLACES = {
    "center": (0.0, 0.0),
    "left": (-0.4, 0.0),
    "right": (0.4, 0.0),
    "top": (0.0, -0.4),
    "bottom": (0.0, 0.4),
}
PATTERNS = ("plain", "striped", "checked")

CAPTIONS = (
    "large red circle center on plain blue background",
    "small yellow square left on striped green background",
    "large white ring right on checked purple background",
    "small blue triangle top on plain orange background",
    "large green cross bottom on striped white background",
    "small purple diamond center on checked yellow background",
    "large orange square top on plain black background",
    "small black circle bottom on checked red background",
)


@dataclass(frozen=True)
class Scene:
    """What a caption says, plus the jitter that it does not say."""

    size: str
    color: str
    shape: str
    place: str
    pattern: str
    background: str
    dx: float = 0.0
    dy: float = 0.0

    @property
    def caption(self):
        return (
            f"{self.size} {self.color} {self.shape} {self.place} on {self.pattern} {self.background} "
            "background"
        )


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with two different colors and a little jitter of the position."""
    color, background = rng.choice(list(COLORS), 2, replace=False)
    return Scene(
        str(rng.choice(list(SIZES))),
        str(color),
        str(rng.choice(SHAPES)),
        str(rng.choice(list(PLACES))),
        str(rng.choice(PATTERNS)),
        str(background),
        *rng.uniform(-0.06, 0.06, 2),
    )


@lru_cache(maxsize=1)
def _grid():
    axis = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    return np.meshgrid(axis, axis)


def _signed_distance(shape, x, y, r):
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
    if shape == "square":
        return np.maximum(ax, ay) - 0.85 * r
    if shape == "diamond":
        return (ax + ay - 1.15 * r) / np.sqrt(2)
    if shape == "cross":
        return np.maximum(np.minimum(ax, ay) - 0.3 * r, np.maximum(ax, ay) - r)
    return np.maximum(0.866 * ax + 0.5 * y, -y) - 0.55 * r  # triangle, tip up is y < 0


def draw(scene: Scene) -> np.ndarray:
    """The picture of a scene: (64, 64, 3) float32 in [0, 1], edges antialiased over one pixel."""
    x, y = _grid()
    base = np.array(COLORS[scene.background], np.float32)
    picture = np.broadcast_to(base, (SIZE, SIZE, 3)).copy()
    if scene.pattern != "plain":
        cells = np.floor((y + 1) * 4)
        if scene.pattern == "checked":
            cells = cells + np.floor((x + 1) * 4)
        picture[cells % 2 == 1] = 0.7 * base + 0.3 * (1 - base.mean())
    cx, cy = PLACES[scene.place]
    distance = _signed_distance(scene.shape, x - cx - scene.dx, y - cy - scene.dy, SIZES[scene.size])
    cover = np.clip(0.5 - distance * SIZE / 2, 0, 1)[..., None].astype(np.float32)
    return picture * (1 - cover) + cover * np.array(COLORS[scene.color], np.float32)


@lru_cache(maxsize=1)
def _basis() -> torch.Tensor:
    """Orthonormal (16, 48): latent channel by (pixel of the 4 x 4 patch, RGB)."""
    n = np.arange(PATCH)
    dct = np.sqrt(2 / PATCH) * np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / (2 * PATCH))
    dct[0] /= np.sqrt(2)
    opponent = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    order = sorted(((i, j) for i in n for j in n), key=lambda ij: (sum(ij), ij))
    rows = [np.einsum("i,j,c->ijc", dct[i], dct[j], opponent[0]) for i, j in order[:10]]
    rows += [np.einsum("i,j,c->ijc", dct[i], dct[j], opponent[c]) for c in (1, 2) for i, j in order[:3]]
    return torch.tensor(np.stack(rows).reshape(LATENT_CHANNELS, -1), dtype=torch.float32)


def gain(luma: float, chroma: float, other: float) -> torch.Tensor:
    """(1, 16, 1, 1): what the channels are multiplied with, those of the mean of lightness and of colour, and
    the others. The first coefficient of lightness is 6.9 times the mean grey."""
    gains = torch.full((LATENT_CHANNELS,), other)
    gains[0], gains[[10, 13]] = luma, chroma
    return gains.view(1, -1, 1, 1)


GAIN = gain(0.5, 0.5, 2.0)  # to about unit variance


def encode(pictures: torch.Tensor, gain: torch.Tensor = GAIN) -> torch.Tensor:
    """Pictures (B, H, W, 3) in [0, 1] -> latents (B, 16, H/4, W/4)."""
    b, h, w, _ = pictures.shape
    patches = (
        (pictures * 2 - 1)
        .reshape(
            b,
            h // PATCH,
            PATCH,
            w // PATCH,
            PATCH,
            3,
        )
        .permute(
            0,
            1,
            3,
            2,
            4,
            5,
        )
    )
    latent = patches.reshape(b, h // PATCH, w // PATCH, -1) @ _basis().T
    return latent.permute(0, 3, 1, 2) * gain


def decode(latents: torch.Tensor, gain: torch.Tensor = GAIN) -> torch.Tensor:
    """Latents (B, 16, h, w) -> pictures (B, 4h, 4w, 3) clipped to [0, 1]."""
    latents = latents.float().cpu() / gain
    b, _, h, w = latents.shape
    patches = latents.permute(0, 2, 3, 1) @ _basis()
    pictures = (
        patches.reshape(b, h, w, PATCH, PATCH, 3)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(b, h * PATCH, w * PATCH, 3)
    )
    return ((pictures + 1) / 2).clamp(0, 1)


@lru_cache(maxsize=4096)
def _word(text: str) -> torch.Tensor:
    return torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def encode_words(words: Sequence[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, a slot each -> (context (tokens, 128), pooled (128,)); slots beyond the last word are zero.

    FLUX gives text tokens no position, so each word's fixed random vector carries that of its slot.
    """
    context = torch.zeros(tokens, TEXT_DIM)
    for slot, word in enumerate(words[:tokens]):
        context[slot] = (_word(word) + _word(f"slot {slot}")) / 2**0.5 + _word(f"{word} in slot {slot}")
    return context, context.mean(0) * tokens**0.5


def encode_caption(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A caption -> (context (8, 128), pooled (128,)). The empty caption is all zeros."""
    return encode_words(caption.split(), TEXT_TOKENS)
