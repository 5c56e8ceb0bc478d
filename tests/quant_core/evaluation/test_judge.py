"""Paired differences against figures worked out by hand, and the interval against draws of a known law."""

import numpy as np
import pytest

from comfyui_nibble.quant_core.evaluation.judge import LEVEL, over_seeds, paired, spread


def test_by_hand():
    found = paired([30.0, 31.0, 40.0, 20.0], [31.0, 33.0, 39.5, 20.0])
    assert (found.median, found.wins, found.count) == (0.5, 2.5, 4)  # of 1, 2, -0.5 and 0
    assert found.low <= 0.5 <= found.high
    assert str(paired([30.0] * 3, [31.25] * 3)) == "+1.25 dB (+1.25 to +1.25), better in 3 of 3"


def test_one_flipped_picture_decides_nothing():
    """A mean of squared errors over these 16 pictures ranks b below a by 8 dB."""
    a = np.full(16, 45.0)
    b = a + 1
    b[3] = 20
    found = paired(a, b)
    assert found.median == 1
    assert found.low == 1
    assert found.wins == 15
    mean = lambda db: -10 * np.log10(np.mean(10 ** (-db / 10)))
    assert mean(b) < mean(a) - 8


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for i in range(200):
        gain = rng.normal(0.7, 2, 24)
        found = paired(np.zeros(24), gain, seed=i)
        held += found.low <= 0.7 <= found.high
    assert LEVEL - 0.08 < held / 200 < LEVEL + 0.08


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ([], [], "equally many"),
        ([1.0], [1.0, 2.0], r"\(1,\) and \(2,\)"),
        ([1.0], [float("inf")], "finite"),
    ],
)
def test_what_has_no_answer_is_refused(a, b, text):
    with pytest.raises(ValueError, match=text):
        paired(a, b)


def test_spread_over_seeds():
    assert spread([[30.0, 32.0, 50.0], [34.0, 34.0, 34.0]]) == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="two seeds"):
        spread([[1.0]])


def test_pictures_of_several_seeds():
    """The spread is that of the differences: pictures that are easier with one seed are no part of it."""
    a = [[30.0, 31.0, 32.0], [50.0, 51.0, 52.0]]
    b = [[31.0, 32.0, 33.5], [53.0, 54.0, 54.0]]
    found, apart = over_seeds(a, b)  # 1, 1, 1.5 and 3, 3, 2
    assert (found.median, found.wins, found.count) == (1.75, 6, 6)
    assert apart == pytest.approx(2**0.5)  # of 1 and 3
    assert over_seeds(a[:1], b[:1]) == (paired(a[0], b[0]), None)
    with pytest.raises(ValueError, match="zip"):
        over_seeds(a, b[:1])
