"""Procedural captioned coats of arms, 68 x 68, their latents and their text encoding: the world of the
small PixArt.

Everything is a closed formula, so the model can be trained, sampled and judged with no download. A caption
says all but from where the light falls on the wall. One caption in eight is never trained on: `held_out`.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from . import pictures
from .charges import CHARGES, polygon

# 17 x 17 tokens of 4 x 4 pixels: ComfyUI's PixArt divides by zero where a latent is 32 or less wide.
SIZE = 68
TEXT_TOKENS = 12
FILL = "-"
TOKEN = pictures.PATCH  # pixels of a token each way
CHANNELS = 4  # of a latent, half as wide as the picture
GAIN = pictures.gain(0.35, 0.8, 1.5)

TINCTURES = {
    "red": (0.80, 0.13, 0.14),
    "blue": (0.10, 0.25, 0.66),
    "green": (0.10, 0.50, 0.24),
    "black": (0.13, 0.12, 0.16),
    "purple": (0.50, 0.18, 0.58),
    "gold": (0.98, 0.76, 0.16),
    "white": (0.95, 0.95, 0.92),
}
ORDINARIES = ("border", "pale", "fess", "bend", "chevron", "quarters", "stripes")
WALLS = ("bricks", "planks", "velvet")
CRESTS = ("crown", "bare")
SIDES = ("swords", "laurel", "alone")
CAPTIONS = (
    "gold star on blue field, white quarters, bricks, crown, laurel",
    "white crescent on black field, purple border, bricks, crown, swords",
    "white ship on red field, blue pale, planks, bare, laurel",
    "black tower on gold field, red pale, planks, crown, alone",
    "red heart on white field, black stripes, bricks, bare, laurel",
    "gold sun on purple field, green border, bricks, crown, laurel",
    "green tree on white field, gold pale, velvet, bare, alone",
    "purple star on gold field, green fess, planks, bare, alone",
)


@dataclass(frozen=True)
class Scene:
    """What a caption says, plus the place of the light, -1 (left) to 1, that it does not say."""

    color: str
    charge: str
    field: str
    second: str
    ordinary: str
    wall: str
    crest: str
    sides: str
    light: float = 0.0

    @property
    def caption(self):
        return (
            f"{self.color} {self.charge} on {self.field} field, {self.second} {self.ordinary}, {self.wall}, "
            f"{self.crest}, {self.sides}"
        )


def held_out(caption: str) -> bool:
    """Whether the training leaves a caption out, by its checksum."""
    return zlib.crc32(caption.encode()) % 8 == 0


def scene_of(rng: np.random.Generator, held: bool) -> Scene:
    """A random scene of those that are trained on, or of those held out."""
    while True:
        color, field, second = (str(c) for c in rng.choice(list(TINCTURES), 3, replace=False))
        words = (str(rng.choice(w)) for w in (tuple(CHARGES), ORDINARIES, WALLS, CRESTS, SIDES))
        charge, ordinary, wall, crest, sides = words
        scene = Scene(color, charge, field, second, ordinary, wall, crest, sides, float(rng.uniform(-1, 1)))
        if held_out(scene.caption) == held:
            return scene


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene that was never trained on: three different tinctures, all other words independent."""
    return scene_of(rng, held=True)


OVER = 3  # drawn this many times as large each way, then averaged
INK = np.array((0.07, 0.06, 0.09), np.float32)
PALE = np.array((0.86, 0.83, 0.76), np.float32)  # outlines what is black
STEEL = np.array((0.80, 0.84, 0.90), np.float32)
GOLD = np.array(TINCTURES["gold"], np.float32)
LEAF = np.array((0.36, 0.62, 0.25), np.float32)
LINE = 1.1 / SIZE
RADIUS = 0.22  # of a charge


@lru_cache(maxsize=1)
def _grid():
    axis = (np.arange(SIZE * OVER, dtype=np.float32) + 0.5) / (SIZE * OVER)
    return np.meshgrid(axis, axis)


class _Canvas:
    """Colours, and where one was painted."""

    def __init__(self):
        self.x, self.y = _grid()
        self.rgb = np.zeros((*self.x.shape, 3), np.float32)
        self.painted = np.zeros(self.x.shape, bool)

    def paint(self, mask, color):
        self.rgb[mask] = color
        self.painted |= mask

    def lay(self, layer):
        np.copyto(self.rgb, layer.rgb, where=layer.painted[..., None])

    def outlined(self, distance, color, line=INK):
        self.paint(distance < LINE, line)
        self.paint(distance < 0, color)


@lru_cache(maxsize=len(WALLS))
def _wall(kind):
    return _masonry(kind, *_grid()).astype(np.float32)


def _masonry(kind, x, y):
    if kind == "bricks":
        row = np.floor(y * 8.5)
        across = x * 4.25 + 0.5 * (row % 2)
        tone = np.sin(row * 12.9 + np.floor(across) * 78.2) * 0.05
        seam = (np.abs(y * 8.5 - row - 0.5) > 0.40) | (np.abs(across % 1 - 0.5) > 0.45)
        return np.where(seam[..., None], (0.50, 0.46, 0.45), np.array((0.66, 0.50, 0.43)) + tone[..., None])
    if kind == "planks":
        plank = np.floor(x * 5)
        grain = 0.035 * np.sin(34 * y + 7 * plank + 4 * np.sin(9 * y + 3 * plank)) + 0.05 * np.sin(
            plank * 4.1
        )
        seam = np.abs(x * 5 - plank - 0.5) > 0.46
        wood = np.array((0.55, 0.38, 0.23)) + grain[..., None]
        return np.where(seam[..., None], (0.25, 0.16, 0.10), wood)
    fold = np.sin(2 * np.pi * (x * 4 + 0.06 * np.sin(5 * y)))
    return np.array((0.30, 0.36, 0.42)) + 0.11 * fold[..., None] * np.array((0.8, 1.0, 1.1))


@lru_cache(maxsize=1)
def _shield():
    """Coordinates from the middle of the shield's top, and the signed distance from the shield, about."""
    u, v = _grid()[0] - 0.5, _grid()[1] - 0.19
    half = np.where(v < 0.3, 0.315, 0.315 * np.sqrt(np.clip(1 - ((v - 0.3) / 0.42) ** 2, 0, 1)))
    return u, v, np.maximum(np.abs(u) - half, np.maximum(-v, v - 0.72))


@lru_cache(maxsize=len(ORDINARIES))
def _ordinary(kind):
    """Where the second tincture lies."""
    x, y, shield = _shield()
    return {
        "border": shield > -0.062,
        "pale": np.abs(x) < 0.10,
        "fess": np.abs(y - 0.28) < 0.10,
        "bend": np.abs(x - (y - 0.29)) < 0.14,
        "chevron": np.abs(y - 0.26 - 0.75 * np.abs(x)) < 0.11,
        "quarters": (x < 0) != (y < 0.29),
        "stripes": np.floor((x + 0.35) / 0.1) % 2 == 1,
    }[kind] & (shield < -0.008)


@lru_cache(maxsize=len(CHARGES))
def _placed(kind):
    """The signed distance from a charge in the middle of the shield."""
    u, v, _ = _shield()
    return RADIUS * CHARGES[kind](u / RADIUS, (v - 0.29) / RADIUS)


def _laurel(canvas):
    x, y = np.abs(canvas.x - 0.5), canvas.y
    canvas.paint((np.abs(np.hypot(x, y - 0.5) - 0.425) < 0.012) & (y > 0.27), INK)
    for i in range(6):
        a = np.pi * (0.40 - 0.125 * i)
        for out, lean in ((0.465, 0.5), (0.385, -0.5)):
            cx, cy = out * np.cos(a), 0.5 + out * np.sin(a)
            u, v = np.cos(a - np.pi / 2 + lean), np.sin(a - np.pi / 2 + lean)
            along, off = (x - cx) * u + (y - cy) * v, -(x - cx) * v + (y - cy) * u
            d = np.hypot(along / 0.062, off / 0.03) - 1
            canvas.paint(d < 0.34, INK)
            canvas.paint(d < 0, LEAF)


def _swords(canvas):
    for sign in (-1, 1):
        x, y = sign * (canvas.x - 0.5), canvas.y - 0.5
        along, off = (x - y) * 0.7071, (x + y) * 0.7071  # the tip is at the top right
        blade = np.maximum(np.abs(off) - 0.026, np.abs(along - 0.05) - 0.55)
        blade = np.maximum(blade, along + np.abs(off) - 0.6)
        canvas.outlined(blade, STEEL)
        canvas.paint((np.abs(off) < 0.006) & (np.abs(along) < 0.54), 0.75 * STEEL)
        guard = np.maximum(np.abs(off) - 0.085, np.abs(along + 0.47) - 0.022)
        canvas.outlined(np.minimum(guard, np.hypot(along + 0.62, off) - 0.04), GOLD)


def _crown(canvas):
    x, y = canvas.x - 0.5, canvas.y - 0.035
    body = polygon(
        *(x, y),
        (-0.16, 0.15),
        (-0.22, 0.02),
        (-0.1, 0.08),
        (0.0, -0.02),
        (0.1, 0.08),
        (0.22, 0.02),
        (0.16, 0.15),
    )
    for cx, cy in ((-0.22, 0.015), (0.0, -0.02), (0.22, 0.015)):
        body = np.minimum(body, np.hypot(x - cx, y - cy) - 0.022)
    canvas.outlined(body, GOLD)
    for cx in (-0.09, 0.0, 0.09):
        canvas.paint(np.hypot(x - cx, y - 0.118) < 0.019, TINCTURES["red"])


@lru_cache(maxsize=3)
def _layer(kind):
    canvas = _Canvas()
    {"swords": _swords, "laurel": _laurel, "crown": _crown}[kind](canvas)
    return canvas


def draw(scene: Scene) -> np.ndarray:
    """The picture of a scene: (68, 68, 3) float32 in [0, 1], edges antialiased over one pixel."""
    canvas = _Canvas()
    x, y = canvas.x, canvas.y
    away = np.hypot(x - 0.5 - 0.45 * scene.light, y - 0.25)
    canvas.rgb = _wall(scene.wall) * (1.22 - 0.62 * away)[..., None]
    if scene.sides != "alone":
        canvas.lay(_layer(scene.sides))
    u, _, shield = _shield()
    canvas.paint(shield < 0.032, INK)
    canvas.paint(shield < 0.022, 0.9 * GOLD if scene.crest == "crown" else 0.8 * STEEL)
    canvas.paint(shield < 0.006, INK)
    face = shield < -0.008
    canvas.paint(face, TINCTURES[scene.field])
    canvas.paint(_ordinary(scene.ordinary), TINCTURES[scene.second])
    dome = 1.06 - 0.30 * np.clip(u + 0.25, 0, 1)  # the right side is darker
    canvas.rgb[face] *= dome[face][:, None]
    canvas.outlined(_placed(scene.charge), TINCTURES[scene.color], PALE if scene.color == "black" else INK)
    if scene.crest == "crown":
        canvas.lay(_layer("crown"))
    return canvas.rgb.clip(0, 1).reshape(SIZE, OVER, SIZE, OVER, 3).mean((1, 3))


def encode(images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, H, W, 3) in [0, 1] -> latents (B, 4, H/2, W/2): the 16 coefficients of a patch of 4 x 4
    pixels lie in the 2 x 2 latent pixels of one token."""
    return torch.pixel_shuffle(pictures.encode(images, GAIN), 2)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, h, w) -> pictures (B, 2h, 2w, 3) clipped to [0, 1]."""
    return pictures.decode(torch.pixel_unshuffle(latents.float().cpu(), 2), GAIN)


def encode_caption(caption: str) -> torch.Tensor:
    """A caption -> context (12, 128), with or without its commas; the empty one is all zeros.

    Slots without a word hold a word of their own, on which attention can rest.
    """
    words = [word for word in caption.replace(",", " ").split() if word not in ("on", "field")]
    fill = [FILL] * (TEXT_TOKENS - len(words)) if words else []
    return pictures.encode_words(words + fill, TEXT_TOKENS)[0]


def vocabulary() -> tuple[torch.Tensor, torch.Tensor]:
    """(all rows that a context can have (V, 128), which of them fill the slots behind the last word (V,))."""
    tinctures = tuple(TINCTURES)
    slots = (tinctures, tuple(CHARGES), tinctures, tinctures, ORDINARIES, WALLS, CRESTS, SIDES)
    sentences = [[slot[i % len(slot)] for slot in slots] for i in range(max(map(len, slots)))]
    rows = torch.cat([encode_caption(" ".join(words)) for words in sentences])
    filled = (torch.arange(len(rows)) % TEXT_TOKENS) >= len(slots)
    _, found = np.unique(rows.numpy(), axis=0, return_index=True)
    empty = torch.zeros(1, rows.shape[1])
    return torch.cat([empty, rows[found]]), torch.cat([torch.zeros(1, dtype=torch.bool), filled[found]])
