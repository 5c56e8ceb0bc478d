"""The pictures of README and registry are those that the scripts draw, and their words can be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_nibble.tests.pictures import logo, result

pytestmark = pytest.mark.quick


def luminance(color) -> float:
    """WCAG's, of (red, green, blue) up to 255."""
    part = np.array(color) / 255
    return float(
        np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    )


def contrast(one, other) -> float:
    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


def test_words_have_the_contrast_that_accessibility_asks_for():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast(logo.LIGHT, logo.DARK) >= 7
    assert contrast(logo.MUTED, logo.DARK) >= 4.5
    assert min(contrast(color, logo.DARK) for color in logo.WARM) >= 4.5  # the mark


@pytest.mark.parametrize(("drawn", "name"), [(logo.icon, "icon.png"), (logo.banner, "banner.png")])
def test_what_is_committed_is_what_the_script_draws(drawn, name):
    """But for edges, which another release of the font's renderer may round otherwise."""
    made = drawn()
    with Image.open(logo.FOLDER / name) as kept:
        assert (kept.size, kept.mode) == (made.size, made.mode)
        away = np.abs(np.asarray(kept, np.int16) - np.asarray(made, np.int16))
    assert away.mean() < 1


def test_the_mark_is_nibbled_at_in_one_corner():
    mark = np.asarray(logo.bits(400))
    whole, bitten = mark[:180, :180], mark[:180, 220:]
    assert (mark[220:, 220:] == whole).mean() > 0.97
    assert 0.5 < (bitten > 0).mean() / (whole > 0).mean() < 0.8


def test_a_row_for_the_original_and_for_each_method():
    """Every picture where it belongs, and how far a method is away in dB: 20 for a tenth of the range."""
    count, side, gap, margin, label = len(result.SHOWN), result.SIDE, result.GAP, result.MARGIN, result.LABEL
    grey = torch.full((count, 64, 64, 3), 0.5)
    sheet = np.asarray(result.sheet(grey, {name: grey + 0.1 * n for n, name in enumerate(result.ROWS, 1)}))
    assert sheet.shape[0] == 2 * margin + 3 * (side + gap) - gap
    for row, value in enumerate((0.5, 0.6, 0.7)):
        y, x = margin + row * (side + gap), margin + label
        assert (sheet[y : y + side, x : x + side] == round(255 * value)).all()
        assert (sheet[y : y + side, x - gap : x] == logo.DARK).all()
