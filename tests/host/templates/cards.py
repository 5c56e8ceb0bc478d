"""The templates' pictures, square and legible at 200 pixels: one idea each, in one style."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, BAND = 512, 118
INK, PAPER, ACCENT, WARM = (14, 18, 28), (244, 247, 252), (86, 180, 233), (230, 159, 0)


def font(size: int):
    """Pillow's own, which is on every machine."""
    return ImageFont.load_default(size)


def enlarged(picture: np.ndarray, width: int, height: int) -> Image.Image:
    """A picture (height, width, 3) in [0, 1] cut to the shape asked for, about its middle."""
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fitted(draw, text: str, width: int, largest: int):
    """The largest font at which a text fits a width."""
    size = largest
    while draw.textlength(text, font=font(size)) > width:
        size -= 2
    return font(size)


def card(text: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty card with its words below."""
    image = Image.new("RGB", (SIDE, SIDE), INK)
    draw = ImageDraw.Draw(image)
    draw.text(
        (SIDE / 2, SIDE - BAND / 2), text, PAPER, font=fitted(draw, text, SIDE - 40, 76), anchor="mm",
        stroke_width=1, stroke_fill=PAPER,
    )  # fmt: skip
    return image, draw


def tag(draw, middle: float, y: float, text: str, width: float, largest: int = 50):
    """Words on a dark plate over a picture."""
    face = fitted(draw, text, width - 36, largest)
    half = draw.textlength(text, font=face) / 2 + 14
    height = face.size * 0.62 + 10
    draw.rounded_rectangle((middle - half, y - height, middle + half, y + height), 12, INK)
    draw.text((middle, y), text, PAPER, font=face, anchor="mm", stroke_width=1, stroke_fill=PAPER)


def panes(pictures, words, text: str) -> Image.Image:
    """Pictures side by side with a word on each. Each pane has its part of the picture, so that several views
    of one scene together are the scene."""
    image, draw = card(text)
    height, count = SIDE - BAND, len(pictures)
    for i, picture in enumerate(pictures):
        left, right = round(SIDE * i / count), round(SIDE * (i + 1) / count)
        image.paste(enlarged(picture, SIDE, height).crop((left, 0, right, height)), (left, 0))
        if i:
            draw.line((left, 0, left, height), PAPER, 6)
    for i, word in enumerate(words):
        if word:
            tag(draw, SIDE * (i + 0.5) / count, height - 50, word, SIDE / count)
    return image


def whole(picture, text: str, word: str = "") -> Image.Image:
    """One picture."""
    return panes([picture], [word], text)


def rows(pictures, text: str) -> Image.Image:
    """Frames of a film, with its holes."""
    image, draw = card(text)
    height, edge, count = SIDE - BAND, 46, len(pictures)
    width = (SIDE - 12 * (count + 1)) / count
    for i, picture in enumerate(pictures):
        part = enlarged(picture, round(width), height - 2 * edge)
        image.paste(part, (round(12 + i * (width + 12)), edge))
    for x in range(10, SIDE, 42):
        for y in (12, height - 34):
            draw.rounded_rectangle((x, y, x + 24, y + 22), 5, PAPER)
    return image


def steps(picture, text: str) -> Image.Image:
    """A picture under three numbered steps."""
    image, draw = card(text)
    image.paste(enlarged(picture, SIDE, SIDE - BAND), (0, 0))
    y, xs = (SIDE - BAND) / 2, [96, 256, 416]
    draw.line((xs[0], y, xs[-1], y), PAPER, 10)
    for i, x in enumerate(xs, start=1):
        draw.ellipse((x - 62, y - 62, x + 62, y + 62), INK, PAPER, 8)
        draw.text((x, y), str(i), PAPER, font=font(84), anchor="mm", stroke_width=2, stroke_fill=PAPER)
    return image


def bars(values, text: str, marked=(), over=None) -> Image.Image:
    """A chart of bars, some of them marked."""
    image, draw = card(text)
    height = SIDE - BAND
    if over is not None:
        image.paste(
            Image.blend(enlarged(over, SIDE, height), Image.new("RGB", (SIDE, height), INK), 0.55), (0, 0)
        )
    step, top = (SIDE - 48) / len(values), max(values)
    for i, value in enumerate(values):
        x, tall = 24 + i * step, (height - 60) * value / top
        draw.rounded_rectangle(
            (x + step * 0.12, height - 16 - tall, x + step * 0.88, height - 16),
            6,
            WARM if i in marked else ACCENT,
        )
    return image


def cells(matrix: np.ndarray, colours, text: str) -> Image.Image:
    """A heat map without words; colours: a function of [0, 1] to RGB."""
    image, draw = card(text)
    high, wide = matrix.shape
    step_x, step_y = (SIDE - 32) / wide, (SIDE - BAND - 32) / high
    low, top = np.nanmin(matrix), np.nanmax(matrix)
    for (row, column), value in np.ndenumerate(matrix):
        if np.isnan(value):
            continue
        x, y = 16 + column * step_x, 16 + row * step_y
        share = (value - low) / (top - low or 1)
        draw.rounded_rectangle((x + 2, y + 2, x + step_x - 2, y + step_y - 2), 4, colours(share))
    return image
