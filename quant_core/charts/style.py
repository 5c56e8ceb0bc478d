"""The look of every drawing: two themes, and colours that colour-blind people tell apart."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A node shows a picture at 400 to 500 pixels: half of this, so that text of 22 pixels is read as 11 there.
WIDTH = 960
MARGIN = 28
TITLE, TEXT, SMALL = 30, 24, 21  # heights of type, in pixels


@dataclass(frozen=True)
class Theme:
    """Colours of a drawing, as "#rrggbb". plain: of what is neither good nor bad, such as 16 bit."""

    name: str
    background: str
    panel: str
    text: str
    muted: str
    line: str
    plain: str


# Dark is ComfyUI's own: its canvas is #212121, its nodes #353535.
DARK = Theme(
    "dark",
    "#1b1d21",
    "#25282e",
    "#f2f2f2",
    "#b4b9c2",
    "#454a54",
    "#5b616d",
)
LIGHT = Theme(
    "light",
    "#ffffff",
    "#f2f3f5",
    "#16181c",
    "#555b66",
    "#c9cdd4",
    "#a9afb9",
)
THEMES = {theme.name: theme for theme in (DARK, LIGHT)}

# Okabe and Ito, Color Universal Design (2008), without black: apart for every kind of colour vision.
CATEGORIES = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#f0e442", "#999999")
# Even in lightness, so that they are in order without any hue: matplotlib's viridis and inferno (CC0), at
# eleven places each.
_places = lambda colors: tuple(f"#{color}" for color in re.findall("......", colors))
VIRIDIS = _places("440154482475414487355f8d2a788e21918c22a88444bf707ad151bddf26fde725")
INFERNO = _places("000004160b39420a686a176e932667bc3754dd513af37819fca50af6d746fcffa4")
# A verdict is told by a sign as well as by a colour.
LEVELS = {"green": ("#2fb98a", "✓"), "amber": ("#e69f00", "!"), "red": ("#e8663d", "✗")}


Color = str | np.ndarray  # "#rrggbb", or (3,) in [0, 1]


def rgb(color: str) -> np.ndarray:
    """(3,) in [0, 1] of "#rrggbb"."""
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def to_hex(color: Color) -> str:
    """ "#rrggbb" of a colour in either form."""
    if isinstance(color, str):
        return color
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)


def scale(values: np.ndarray, colors: Sequence[str] = VIRIDIS) -> np.ndarray:
    """Colours (..., 3) in [0, 1] of values (...) in [0, 1], along a sequence of colours; values outside are
    clipped."""
    stops = np.stack([rgb(color) for color in colors])
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(values, places, stops[:, i]) for i in range(3)], -1)


def standing_out(theme: Theme) -> tuple[str, ...]:
    """Viridis from what needs no attention to what does: towards the colour that is farthest from the
    background."""
    return VIRIDIS if theme.name == "dark" else VIRIDIS[::-1]


def readable_on(color: str) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG's relative luminance)."""
    linear = np.where(rgb(color) <= 0.04045, rgb(color) / 12.92, ((rgb(color) + 0.055) / 1.055) ** 2.4)
    return "#000000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#ffffff"
