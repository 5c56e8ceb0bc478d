"""Pictures beside each other and their differences."""

import pytest
import torch

from comfyui_nibble.quant_core.charts.pictures import (
    Tile,
    amplification,
    colored,
    difference,
    side_by_side,
    strip_of,
)
from comfyui_nibble.quant_core.charts.style import DARK, INFERNO, rgb

pytestmark = pytest.mark.quick


def test_tiles_keep_their_pixels():
    red, blue = torch.zeros(64, 96, 3), torch.zeros(64, 96, 3)
    red[..., 0], blue[..., 2] = 1, 1
    whole = side_by_side(
        [[Tile(red, "a", ("x",)), Tile(blue, "b" * 99)], [Tile(None, "", ("words",)), Tile(red, "")]]
    )
    assert whole.dtype == torch.float32
    count = lambda color: int((whole[0] == torch.tensor(color)).all(-1).sum())
    enlarged = 5 * 5  # 96 to 480 pixels
    assert count([1.0, 0.0, 0.0]) == 2 * 64 * 96 * enlarged
    assert count([0.0, 0.0, 1.0]) == 64 * 96 * enlarged
    assert whole[0, 0, 0].tolist() == pytest.approx(rgb(DARK.background).tolist(), abs=1e-3)


def test_large_pictures_stay_as_large_as_they_are():
    picture = torch.rand(16, 1000, 3, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    whole = side_by_side([[Tile(picture, "a")]])
    assert whole.shape[2] < 1100
    rows = [y for y in range(whole.shape[1]) if torch.allclose(whole[0, y, 25:1025], picture[0], atol=1e-3)]
    assert len(rows) == 1


def test_differences_are_amplified_by_what_is_said():
    a = torch.full((20, 20, 3), 0.5)
    b = a.clone()
    b[:10] += torch.tensor([0.06, 0.03, 0.03])
    apart = difference(a, b)
    assert apart[:10].unique().tolist() == pytest.approx([0.04], abs=1e-6)
    assert amplification([apart]) == 16  # 0.64
    assert amplification([apart, 20 * apart]) == 1
    assert amplification([torch.zeros(4, 4)]) == 32
    shown = colored(apart, 16)
    assert shown[15, 0].tolist() == pytest.approx(rgb(INFERNO[0]).tolist())
    assert shown[0, 0].sum() > 1


def test_a_strip_has_frames_from_first_to_last():
    frames = torch.arange(9).float().view(9, 1, 1, 1).expand(9, 2, 3, 3)
    assert strip_of(frames)[::2, 0, 0].tolist() == [0, 3, 5, 8]
    assert strip_of(frames[:2]).shape == (4, 3, 3)
