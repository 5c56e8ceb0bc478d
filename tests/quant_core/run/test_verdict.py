"""What a person is told of a quantized model."""

import pytest

from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.run.verdict import Verdict, percent, verdict

pytestmark = pytest.mark.quick

SHAPES = {"b.0.x.weight": (10000, 50000), "b.1.x.weight": (10000, 50000), "in.weight": (1000, 10000)}


def row(name, db=24.4, nbytes=281_000_000):
    return Row(name, name[:3], 50000, 10000, "W4A4", sqnr_db=db, nbytes=nbytes)


def test_the_sentence_has_the_worst_layer_the_size_and_what_was_kept():
    rows = [row("b.0.x"), row("b.1.x", 31.0), Row("in", "", 10000, 1000, "16 bit")]
    assert verdict(rows, SHAPES) == Verdict(
        "green", "Very close to the original: worst layer 24 dB (6 % off), 0.6 GB instead of 2.0"
    )
    rows[1] = Row("b.1.x", "b.1", 50000, 10000, "16 bit", note="raised")
    assert verdict(rows, SHAPES).sentence == (
        "Very close to the original: worst layer 24 dB (6 % off), 1.3 GB instead of 2.0, "
        "1 layer kept in 16 bit"
    )


@pytest.mark.parametrize(
    ("db", "level", "begins"),
    [
        (24.0, "green", "Very close to the original"),
        (23.9, "green", "Close to the original"),
        (17.0, "green", "Close to the original"),
        (16.9, "amber", "Mostly close to the original, compare a picture"),
        (10.0, "amber", "Mostly close"),
        (9.9, "red", "Far from the original, expect noise in pictures"),
        (-2.3, "red", "Far"),
    ],
)
def test_the_worst_layer_decides(db, level, begins):
    found = verdict([row("b.0.x", 40.0), row("b.1.x", db)], SHAPES)
    assert found.level == level
    assert found.sentence.startswith(begins)
    assert bool(found.advice) == (level != "green")


def test_advice_names_the_layers_and_the_remedies():
    rows = [row(f"b.{i}.x", 16.0 - i) for i in range(5)] + [row("b.9.x", 20.0)]
    found = verdict(rows, SHAPES)
    assert found.advice[0] == (
        "Below 17 dB: 5 of 6 layers (b.4.x at 12 dB, b.3.x at 13 dB, b.2.x at 14 dB and 2 more). Nibble "
        "Guard puts such layers into 8 or 16 bit, for a little more memory."
    )
    assert "more samples" in found.advice[1]
    assert "wish best" in found.advice[2]
    assert found.text.splitlines() == [f"Check: {found.sentence}.", *found.advice]


def test_what_was_not_measured_is_amber_and_says_to_calibrate():
    found = verdict([row("b.0.x", None), row("b.1.x", None)], SHAPES)
    assert (found.level, found.sentence) == (
        "amber",
        "Not measured, nobody knows how close it is: 0.6 GB instead of 2.0",
    )
    assert "Calibrate first" in found.advice[0]


def test_nothing_quantized_is_red():
    found = verdict([Row("b.0.x", "b.0", 50000, 10000, "16 bit", sqnr_db=60.0)], SHAPES)
    assert (found.level, found.sentence) == (
        "red",
        "Nothing was quantized: 2.0 GB instead of 2.0, 1 layer kept in 16 bit",
    )


def test_decibels_in_percent():
    assert [percent(db) for db in (0.0, 20.0, 24.0, 40.0, 60.0)] == ["100 %", "10 %", "6 %", "1 %", "0.1 %"]


def test_small_models_are_counted_in_megabytes():
    small = [Row("a", "b", 1000, 1000, "W4A4", sqnr_db=30.0, nbytes=562_500)]
    assert verdict(small, {"a.weight": (1000, 1000)}).sentence.endswith("0.6 MB instead of 2.0")


@pytest.mark.parametrize(
    ("db", "level", "said"),
    [
        (float("inf"), "green", "worst layer exact (0 % off)"),
        (float("-inf"), "red", "worst layer without a number (10000 % off)"),
        (float("nan"), "red", "worst layer without a number"),
    ],
)
def test_numbers_of_a_file_may_be_anything(db, level, said):
    found = verdict([row("b.0.x", db)], SHAPES)
    assert found.level == level
    assert said in found.sentence
