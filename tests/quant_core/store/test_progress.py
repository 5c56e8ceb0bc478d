"""What is said of the time that work will take."""

import pytest

from comfyui_nibble.quant_core.store.progress import Pace, duration

pytestmark = pytest.mark.quick


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_time_left_is_by_what_this_run_did():
    clock = Clock()
    pace = Pace(192, 60, clock)
    assert pace.left() is None
    clock.now += 12
    pace.to(64)
    assert pace.left() == 12 / 4 * 128
    clock.now += 3
    pace.to(65)
    assert pace.left() == 15 / 5 * 127


def test_what_is_found_again_at_once_counts_for_nothing():
    clock = Clock()
    pace = Pace(10, 0, clock)
    for done in (1, 2, 3):
        clock.now += 0.001
        pace.to(done)
    assert pace.left() is None
    for done in (4, 5):
        clock.now += 2
        pace.to(done)
    assert pace.left() == pytest.approx(10)
    clock.now += 0.001  # later quick ones do
    pace.to(6)
    assert pace.left() == pytest.approx(4.001 / 3 * 4)


def test_durations_in_words():
    assert [duration(s) for s in (0, 8.4, 59.4, 60, 200, 3570, 4800)] == [
        "1 s",
        "8 s",
        "59 s",
        "1 min",
        "3 min",
        "1 h 0 min",
        "1 h 20 min",
    ]
