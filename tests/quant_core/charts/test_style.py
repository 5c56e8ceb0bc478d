"""Colours that can be told apart and read."""

import numpy as np
import pytest

from comfyui_nibble.quant_core.charts.style import (
    CATEGORIES,
    DARK,
    INFERNO,
    LEVELS,
    LIGHT,
    THEMES,
    VIRIDIS,
    readable_on,
    rgb,
    scale,
    standing_out,
    to_hex,
)

pytestmark = pytest.mark.quick


def luminance(color):
    """WCAG's, of "#rrggbb"."""
    linear = np.where(rgb(color) <= 0.04045, rgb(color) / 12.92, ((rgb(color) + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one, other):
    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_text_has_the_contrast_that_accessibility_asks_for(theme):
    for ground in (theme.background, theme.panel):
        assert contrast(theme.text, ground) >= 7
        assert contrast(theme.muted, ground) >= 4.5
    assert contrast(theme.plain, theme.background) >= 2
    for color, sign in LEVELS.values():
        assert contrast(color, readable_on(color)) >= 4.5
        assert sign


@pytest.mark.parametrize("colors", [VIRIDIS, INFERNO], ids=["viridis", "inferno"])
def test_sequences_are_in_order_without_any_hue(colors):
    """So that no kind of colour vision sees another order."""
    steps = [luminance(color) for color in colors]
    assert steps == sorted(steps)
    assert min(np.diff([value ** (1 / 3) for value in steps])) > 0.02


def test_categories_are_apart_for_those_who_do_not_see_red_or_green():
    """By the matrices of Vienot, Brettel and Mollon (1999) on linear colours."""
    protan = np.array([[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.004, -0.004, 1]])
    deutan = np.array([[0.2928, 0.7072, 0], [0.2928, 0.7072, 0], [-0.0223, 0.0223, 1]])
    for matrix in (np.eye(3), protan, deutan):
        seen = [matrix @ rgb(color) ** 2.2 for color in CATEGORIES[:6]]
        distances = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
        assert min(distances) > 0.06


def test_scale_goes_through_its_colours():
    values = np.linspace(0, 1, len(VIRIDIS))
    assert [to_hex(color) for color in scale(values)] == list(VIRIDIS)
    assert to_hex(scale(np.array(-1))) == VIRIDIS[0]
    assert to_hex(scale(np.array(2), INFERNO)) == INFERNO[-1]
    assert scale(np.zeros((2, 3))).shape == (2, 3, 3)


def test_what_needs_attention_is_farthest_from_the_background():
    for theme in (DARK, LIGHT):
        first, *_, last = standing_out(theme)
        assert contrast(last, theme.background) > 4 * contrast(first, theme.background)
