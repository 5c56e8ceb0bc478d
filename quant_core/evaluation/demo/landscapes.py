"""Procedural captioned landscapes, 128 x 128, their latents and their text encoding: the world of the small
model that `nibble demo` shows.

Everything is a closed formula, so the model can be trained, sampled and judged with no download. A caption
says all but where the clouds drift: a model that is quantized well draws the same picture.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from . import pictures
from .pictures import PATCH as PATCH

SIZE = 128
TEXT_TOKENS = 16
# Errors of a patch's mean are seen first where all is flat, so it weighs more here than in other pictures.
GAIN = pictures.gain(0.8, 1.0, 2.0)
TIMES = ("dawn", "day", "dusk", "night")
TERRAINS = ("mountains", "hills", "mesas", "volcano")
PLACES = {"left": 0.24, "middle": 0.5, "right": 0.74}
GROUNDS = ("lake", "meadow")
PINES = {
    "no": (),
    "one": ((0.85, 0.36),),
    "three": ((0.72, 0.24), (0.82, 0.36), (0.92, 0.29)),
    "many": (
        *((0.04, 0.33), (0.12, 0.25), (0.19, 0.17)),
        *((0.64, 0.17), (0.73, 0.24), (0.83, 0.36), (0.93, 0.29)),
    ),
}
CABINS = ("no", "one")
CAPTIONS = (
    "mountains at dawn, sun middle, lake, three pines, one cabin",
    "hills at day, sun left, meadow, one pine, one cabin",
    "mesas at dusk, sun middle, lake, many pines, no cabin",
    "volcano at night, moon right, meadow, three pines, one cabin",
    "volcano at dawn, sun middle, lake, many pines, no cabin",
    "mountains at day, sun right, lake, many pines, one cabin",
    "hills at dusk, sun right, lake, one pine, no cabin",
    "mountains at night, moon middle, lake, three pines, no cabin",
)


def _rgb(text):
    return np.array([int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)], np.float32)


# Sky from the top to the horizon, ridges from far to near, banks and pines where lit and in the shade.
_NAMES = (
    *("top", "middle", "horizon", "sun", "cloud", "far", "mid", "near"),
    *("snow", "lit", "bank", "pine_lit", "pine", "wall", "roof", "window"),
)
PALETTES = {
    "dawn": "4f6bb0 e7a6b4 ffdcae fff4d2 ffe9dc b78fb4 86689d 5b4a80 "
    "fff0ea 6d5b8e 4a3f70 4a5a86 2f3760 8d6a86 4a3560 ffd27a",
    "day": "3f97e0 8cc9f4 e2f5fb fff9d8 ffffff 8fbdd8 5c9fae 3f8374 "
    "ffffff 86c26a 5fa455 2f7d5e 1f5f4e f0dcc0 b5523f 5b7f99",
    "dusk": "3b2067 c53f74 ffa552 ffe28a f2809a b04574 7a2f6b 4d205a "
    "ffc3a6 571f5c 2c1140 34164a 1f0c33 6b2a5a 2a0f3a ffd35c",
    "night": "060d2b 14295b 34548c f6f2d8 2b4377 2a4678 1d325f 132347 "
    "a9c0e6 18305a 0c1934 10203f 081227 22365e 0b1630 ffcf66",
}


@dataclass(frozen=True)
class Scene:
    """What a caption says, plus the drift of the clouds, -1 to 1, that it does not say."""

    terrain: str
    time: str
    place: str
    ground: str
    pines: str
    cabin: str
    drift: float = 0.0

    @property
    def caption(self):
        light = "moon" if self.time == "night" else "sun"
        trees = "pine" if self.pines == "one" else "pines"
        return (
            f"{self.terrain} at {self.time}, {light} {self.place}, {self.ground}, {self.pines} {trees}, "
            f"{self.cabin} cabin"
        )


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of independent words, its clouds anywhere in their range."""
    words = (TERRAINS, TIMES, list(PLACES), GROUNDS, list(PINES), CABINS)
    terrain, time, place, ground, pines, cabin = (str(rng.choice(w)) for w in words)
    return Scene(
        terrain,
        time,
        place,
        ground,
        pines,
        cabin,
        float(rng.uniform(-1, 1)),
    )


OVER = 3  # drawn this many times as large each way, then averaged
HORIZON = 0.68
STARS = 13 * (0.0055, 0.008)  # their radii
HEIGHTS = {"dawn": 0.31, "day": 0.17, "dusk": 0.33, "night": 0.18}  # of the sun or the moon
VOLCANO = 0.6  # where its top is


@lru_cache(maxsize=1)
def _grid():
    axis = (np.arange(SIZE * OVER, dtype=np.float32) + 0.5) / (SIZE * OVER)
    return np.meshgrid(axis, axis)


def _polyline(x, *points):
    return np.interp(x, *np.array(points, np.float32).T)


def _ridges(terrain, x):
    """The heights y (down) of the far, middle and near ridge over x."""
    wave = np.sin
    if terrain == "mountains":
        far = _polyline(
            x,
            (0, 0.5),
            (0.1, 0.4),
            (0.18, 0.46),
            (0.36, 0.2),
            (0.53, 0.44),
            (0.7, 0.27),
            (0.86, 0.48),
            (1, 0.38),
        )
        mid = _polyline(
            x, (0, 0.52), (0.14, 0.58), (0.3, 0.47), (0.5, 0.62), (0.66, 0.52), (0.82, 0.6), (1, 0.5)
        )
        return far, mid, 0.635 + 0.025 * wave(9 * x + 1)
    if terrain == "hills":
        return (
            0.45 + 0.055 * wave(8.5 * x + 0.3),
            0.53 + 0.05 * wave(6.5 * x + 2.6),
            0.615 + 0.04 * wave(5.5 * x + 5.2),
        )
    if terrain == "mesas":
        far = _polyline(
            x, (0, 0.56), (0.06, 0.56), (0.1, 0.37), (0.33, 0.37), (0.37, 0.56), (0.55, 0.56),
            (0.58, 0.44), (0.66, 0.44), (0.69, 0.56), (1, 0.56),
        )  # fmt: skip
        mid = _polyline(
            x, (0, 0.61), (0.6, 0.61), (0.66, 0.4), (0.94, 0.4), (1, 0.56),
        )  # fmt: skip
        return far, mid, 0.64 + 0.015 * wave(7 * x + 0.5)
    away = np.abs(x - VOLCANO)
    return (
        np.maximum(0.21 + 0.5 * away**0.75, 0.28 + 0.01 * np.cos(away * 110)),
        0.58 + 0.03 * wave(7 * x + 2.2),
        0.64 + 0.025 * wave(6 * x + 5.0),
    )


class _Canvas:
    """A picture painted back to front: `paint` lays a colour where a mask is set."""

    def __init__(self, palette):
        self.x, self.y = _grid()
        self.c = dict(zip(_NAMES, map(_rgb, palette.split()), strict=True))
        self.rgb = np.zeros((*self.x.shape, 3), np.float32)

    def paint(self, mask, color, alpha=1.0):
        color = self.c[color] if isinstance(color, str) else color
        self.rgb[mask] = (1 - alpha) * self.rgb[mask] + alpha * color


def _sky(canvas, scene):
    x, y, c = canvas.x, canvas.y, canvas.c
    t = np.clip(y / HORIZON, 0, 1)[..., None]
    canvas.rgb = np.where(
        t < 0.55,
        c["top"] + (c["middle"] - c["top"]) * t / 0.55,
        c["middle"] + (c["horizon"] - c["middle"]) * (t - 0.55) / 0.45,
    )
    sx, sy, r = (
        PLACES[scene.place],
        {"dawn": 0.31, "day": 0.17, "dusk": 0.33, "night": 0.18}[scene.time],
        0.085,
    )
    distance = np.hypot(x - sx, y - sy)
    for ring, alpha in ((2.3, 0.12), (1.6, 0.18)):
        canvas.paint(distance < ring * r, "sun", alpha * (0.5 if scene.time == "night" else 1))
    disc = distance < r
    if scene.time == "night":
        rng = np.random.default_rng(3)
        for px, py, size in zip(
            rng.uniform(0, 1, 26),
            rng.uniform(0.02, 0.42, 26),
            STARS,
            strict=True,
        ):
            canvas.paint((np.hypot(x - px, y - py) < size) & (distance > 1.6 * r), "sun", 0.9)
        disc &= np.hypot(x - sx - 0.045, y - sy + 0.02) > 0.8 * r
    canvas.paint(disc, "sun")
    for cx, cy, length in ((0.16, 0.3, 0.11), (0.22, 0.325, 0.15), (0.86, 0.12, 0.12), (0.8, 0.145, 0.09)):
        away = np.abs(x - cx - 0.04 * scene.drift) - length
        canvas.paint(np.hypot(np.maximum(away, 0), y - cy) < 0.011, "cloud", 0.55)


def _land(canvas, scene):
    x, y = canvas.x, canvas.y
    far, mid, near = _ridges(scene.terrain, x[0])
    canvas.paint(y > far, "far")
    slope = np.gradient(far, x[0])
    shade = 0.35 * canvas.c["mid"] + 0.65 * canvas.c["far"]
    if scene.terrain in ("mountains", "volcano"):
        if scene.terrain == "volcano":
            slope = x[0] - VOLCANO + 0.03 * np.sin(40 * y)
        canvas.paint((y > far) & (slope > 0), shade)
        line = 0.345 + 0.018 * np.abs((x * 18) % 2 - 1)
        snow = (y > far) & (y < line)
        canvas.paint(snow, "snow")
        canvas.paint(snow & (slope > 0), 0.6 * canvas.c["snow"] + 0.4 * canvas.c["far"])
    if scene.terrain == "mesas":
        canvas.paint((y > far) & (y > 0.42) & (y < 0.45), shade)
    canvas.paint(y > mid, "mid")
    if scene.terrain == "mesas":
        canvas.paint((y > mid) & (y > 0.46) & (y < 0.5), 0.5 * canvas.c["mid"] + 0.5 * canvas.c["near"])
    canvas.paint(y > near, "near")


def _ground(canvas, scene):
    x, y = canvas.x, canvas.y
    bank = 0.86 + 0.025 * np.sin(5 * x + 0.6)
    if scene.ground == "lake":
        rows = np.clip((2 * HORIZON - y[:, 0]) * SIZE * OVER, 0, SIZE * OVER - 1).astype(int)
        water = y > HORIZON
        mirrored = 0.68 * canvas.rgb[rows] + 0.32 * (0.5 * canvas.c["middle"] + 0.5 * canvas.c["horizon"])
        canvas.rgb = np.where(water[..., None], mirrored, canvas.rgb)
        for cx, cy, length in ((0.3, 0.74, 0.12), (0.62, 0.78, 0.16), (0.16, 0.82, 0.1)):
            canvas.paint((np.abs(x - cx) < length) & (np.abs(y - cy) < 0.0045), "horizon", 0.5)
    else:
        canvas.paint(y > HORIZON + 0.02 * np.sin(4 * x + 2), "lit")
        canvas.paint(y > 0.77 + 0.03 * np.sin(4.5 * x + 4), 0.5 * canvas.c["lit"] + 0.5 * canvas.c["bank"])
    canvas.paint(y > bank, "bank")


def _pine(canvas, cx, height):
    x, y = canvas.x - cx, canvas.y - 0.9
    canvas.paint((np.abs(x) < 0.012) & (y < 0.015) & (y > -0.1 * height - 0.01), "roof")
    for top, bottom, width in ((1.0, 0.62, 0.2), (0.8, 0.36, 0.27), (0.55, 0.1, 0.34)):
        down = (y / height + top) / (top - bottom)  # 0 at the tip, 1 at the hem
        inside = (down > 0) & (down < 1) & (np.abs(x) < 0.5 * width * height * 1.5 * down)
        canvas.paint(inside, "pine")
        canvas.paint(inside & (x < 0), "pine_lit")


def _cabin(canvas):
    x, y = canvas.x - 0.38, canvas.y - 0.9
    canvas.paint((np.abs(x - 0.05) < 0.016) & (y > -0.24) & (y < -0.1), "roof")
    canvas.paint((np.abs(x) < 0.085) & (y > -0.115) & (y < 0.012), "wall")
    canvas.paint((y > -0.215) & (y < -0.105) & (np.abs(x) < 0.02 + 0.95 * (y + 0.215)), "roof")
    for cx in (-0.04, 0.04):
        canvas.paint((np.abs(x - cx) < 0.02) & (np.abs(y + 0.06) < 0.022), "window")


def draw(scene: Scene) -> np.ndarray:
    """The picture of a scene: (128, 128, 3) float32 in [0, 1], edges antialiased over one pixel."""
    canvas = _Canvas(PALETTES[scene.time])
    _sky(canvas, scene)
    _land(canvas, scene)
    _ground(canvas, scene)
    for pine in PINES[scene.pines]:
        _pine(canvas, *pine)
    if scene.cabin == "one":
        _cabin(canvas)
    return canvas.rgb.reshape(
        SIZE,
        OVER,
        SIZE,
        OVER,
        3,
    ).mean((1, 3))


def encode(images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, H, W, 3) in [0, 1] -> latents (B, 16, H/4, W/4)."""
    return pictures.encode(images, GAIN)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 16, h, w) -> pictures (B, 4h, 4w, 3) clipped to [0, 1]."""
    return pictures.decode(latents, GAIN)


def encode_caption(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A caption -> (context (16, 128), pooled (128,)), with or without its commas.

    Slots without a word hold a word of their own: the model finds out where a patch lies by its attention to
    the text, and more tokens tell it more exactly.
    """
    words = ["pines" if word == "pine" else word for word in caption.replace(",", " ").split()]
    return pictures.encode_words(words + ["-"] * (TEXT_TOKENS - len(words)), TEXT_TOKENS)
