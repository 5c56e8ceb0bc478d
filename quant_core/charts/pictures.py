"""Pictures beside each other, with what is to be said of them, and their differences. By Pillow and torch
alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .style import DARK, INFERNO, WIDTH, Theme, scale
from .words import as_tensor, font

SMALLEST = 448  # pixels of a tile that small pictures are enlarged to
MOST_TIMES = 32


@dataclass(frozen=True)
class Tile:
    """picture: (H, W, 3), fp32 in [0, 1]. title: above it; lines: below it, or in its place without one."""

    picture: torch.Tensor | None
    title: str
    lines: tuple[str, ...] = ()


def side_by_side(rows: Sequence[Sequence[Tile]], theme: Theme = DARK) -> torch.Tensor:
    """Rows of tiles of one size as a picture (1, H, W, 3), fp32 in [0, 1]; the first tile has a picture.

    Small pictures are enlarged by whole numbers without smoothing, so that no pixel is made up; text grows
    with the width of the whole.
    """
    from PIL import Image, ImageDraw

    columns, first = max(map(len, rows)), rows[0][0].picture
    assert first is not None
    times = max(1, -(-SMALLEST // first.shape[1]))
    height, width = (times * size for size in first.shape[:2])
    text = max(14, round(24 * columns * width / WIDTH))
    gap, line = text, round(1.4 * text)
    below = [max(len(tile.lines) * (tile.picture is not None) for tile in row) for row in rows]
    tall = sum(line + height + line * n + gap for n in below)
    whole = Image.new("RGB", (gap + columns * (width + gap), gap + tall), theme.background)
    pen, type_ = ImageDraw.Draw(whole), font(text)
    top = gap
    for row, n in zip(rows, below, strict=True):
        for i, tile in enumerate(row):
            left = gap + i * (width + gap)
            pen.text(
                (left, top),
                shortened(tile.title, width, type_),
                fill=theme.text,
                font=type_,
            )
            start = top + line
            if tile.picture is not None:
                whole.paste(as_image(tile.picture, times), (left, start))
                start += height + round(0.2 * text)
            for j, said in enumerate(tile.lines):
                place = (left, start + j * line)
                pen.text(
                    place,
                    shortened(said, width, type_),
                    fill=theme.muted,
                    font=type_,
                )
        top += line + height + line * n + gap
    return as_tensor(whole)


def as_image(picture: torch.Tensor, times: int = 1):
    """Pillow's picture of (H, W, 3) in [0, 1], enlarged by a whole number."""
    from PIL import Image

    pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy())


def shortened(text: str, width: float, type_) -> str:
    """The text without its end where it is wider than that."""
    while len(text) > 1 and type_.getlength(text) > width:
        text = text[:-1]
    return text


def amplification(differences: Sequence[torch.Tensor]) -> int:
    """A power of two, 32 at most, by which all but a 200th of the pixels of pictures' differences stay within
    [0, 1]."""
    largest = max(float(np.quantile(d.cpu().numpy(), 0.995)) for d in differences)
    times = 1
    while 2 * times <= MOST_TIMES and 2 * times * largest <= 1:
        times *= 2
    return times


def difference(reference: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """The mean over the colours of how far two pictures (..., H, W, 3) are apart: (..., H, W)."""
    return (reference.float() - test.float()).abs().mean(-1).cpu()


def colored(apart: torch.Tensor, times: int) -> torch.Tensor:
    """A difference (..., H, W) in the colours from black, no difference, to yellow: (..., H, W, 3)."""
    return torch.from_numpy(scale((times * apart).clamp(0, 1).numpy(), INFERNO)).float()


def strip_of(frames: torch.Tensor, most: int = 4) -> torch.Tensor:
    """Frames (T, H, W, 3) of a video, evenly from first to last, one below the other: (n H, W, 3)."""
    count = min(most, len(frames))
    chosen = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]
    return torch.cat([frames[i] for i in chosen], 0)
