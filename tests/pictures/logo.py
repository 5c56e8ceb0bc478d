"""The pack's icon and banner for the registry. `python -m comfyui_nibble.tests.pictures.logo` draws them into
docs/pictures/."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from comfyui_nibble.tests.host.server import PACK

FOLDER = PACK / "docs" / "pictures"
ICON, BANNER = (400, 400), (1260, 540)  # a square; 21 to 9
FINE = 4  # drawn that many times larger, for smooth edges
DARK, LIGHT, MUTED = (22, 24, 31), (240, 241, 245), (160, 166, 180)
WARM = ((255, 196, 84), (255, 110, 84))  # from the upper left to the lower right
WORDS = ("4-bit diffusion models, made in your graph", "from your own checkpoint. LoRAs keep working.")


def gradient(side: int) -> Image.Image:
    """A square that goes from the first colour of WARM to the second along its diagonal."""
    axis = np.linspace(0, 1, side)
    share = ((axis[:, None] + axis[None]) / 2)[..., None]
    pixels = (1 - share) * np.array(WARM[0]) + share * np.array(WARM[1])
    return Image.fromarray(pixels.round().astype(np.uint8), "RGB")


def bits(side: int) -> Image.Image:
    """The mark: four bits, the last one nibbled at. White where it is, in `side` x `side` pixels."""
    mask = Image.new("L", (side, side), 0)
    pen, gap = ImageDraw.Draw(mask), side * 0.07
    cell = (side - gap) / 2
    for row in range(2):
        for column in range(2):
            x, y = column * (cell + gap), row * (cell + gap)
            pen.rounded_rectangle((x, y, x + cell, y + cell), side * 0.09, fill=255)
    # Bites of teeth: circles along the upper right corner.
    for x, y, r in ((1.0, 0.02, 0.17), (0.8, -0.03, 0.12), (1.03, 0.27, 0.13)):
        pen.ellipse(((x - r) * side, (y - r) * side, (x + r) * side, (y + r) * side), fill=0)
    return mask


def icon() -> Image.Image:
    """400 x 400: the mark on a dark tile with round corners, transparent around it."""
    side = ICON[0] * FINE
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rounded_rectangle((0, 0, side - 1, side - 1), side * 0.2, fill=DARK)
    mark = round(side * 0.58)
    picture.paste(gradient(mark), ((side - mark) // 2, (side - mark) // 2), bits(mark))
    return picture.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """1260 x 540: the mark, the name and what the pack is for, on dark."""
    width, height = (n * FINE for n in BANNER)
    picture = Image.new("RGB", (width, height), DARK)
    pen = ImageDraw.Draw(picture)
    mark = round(height * 0.36)
    left, top = round(width * 0.075), (height - mark) // 2
    picture.paste(gradient(mark), (left, top), bits(mark))
    x = left + mark + round(width * 0.05)
    pen.text((x, height * 0.30), "ComfyUI-Nibble", LIGHT, ImageFont.load_default(86 * FINE))
    for n, line in enumerate(WORDS):
        pen.text((x, height * (0.53 + 0.085 * n)), line, MUTED, ImageFont.load_default(34 * FINE))
    return picture.resize(BANNER, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    icon().save(FOLDER / "icon.png", optimize=True)
    banner().save(FOLDER / "banner.png", optimize=True)
