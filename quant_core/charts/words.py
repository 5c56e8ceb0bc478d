"""Pictures of words, by Pillow alone, which is wherever ComfyUI is."""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch

from .style import MARGIN, TEXT, WIDTH, Theme


def font(size: int):
    """Pillow's own outline font; of a build without FreeType its small bitmap one."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


# What Pillow's font has no shape for.
_SPELLED = str.maketrans({"·": ",", "…": "..."})


def page(lines: Sequence[str], theme: Theme, width: int = WIDTH) -> torch.Tensor:
    """Lines of text, wrapped, as a picture (1, H, width, 3), fp32 in [0, 1]; the first line stands out."""
    from PIL import Image, ImageDraw

    letters = int((width - 2 * MARGIN) / (0.55 * TEXT))
    wrapped = [
        (part, i == 0)
        for i, line in enumerate(lines)
        for part in textwrap.wrap(line.translate(_SPELLED), letters) or [""]
    ]
    step = round(1.5 * TEXT)
    picture = Image.new("RGB", (width, 2 * MARGIN + step * len(wrapped)), theme.background)
    pen, type_ = ImageDraw.Draw(picture), font(TEXT)
    for i, (part, first) in enumerate(wrapped):
        color = theme.text if first else theme.muted
        pen.text(
            (MARGIN, MARGIN + i * step),
            part,
            fill=color,
            font=type_,
        )
    return as_tensor(picture)


def as_tensor(picture) -> torch.Tensor:
    """Pillow's picture as (1, H, W, 3), fp32 in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).float()[None] / 255
