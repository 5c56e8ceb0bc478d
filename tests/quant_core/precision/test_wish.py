"""What a wish becomes, on the sizes of FLUX.1: 23.8 GB in 16 bit, 6.7 in 4, 4.3 with weights of three "
"values."""

from dataclasses import replace

import pytest

from comfyui_nibble.quant_core.families.flux import FLUX
from comfyui_nibble.quant_core.methods import METHODS, by_name
from comfyui_nibble.quant_core.precision.wish import (
    RANK,
    SMALL,
    WISHES,
    Facts,
    WishError,
    choose,
    statistics_bytes,
)
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.assets.synthetic import flux_shapes

pytestmark = pytest.mark.quick
SHAPES = flux_shapes(19, 38)
FLUX_FACTS = Facts(FLUX.layers(SHAPES), SHAPES, steps=20, room=1_065_000_000, card=24 * 2**30)


def test_balanced_and_best_repair_what_is_far_off():
    balanced, best = choose("balanced", FLUX_FACTS), choose("best", FLUX_FACTS)
    assert (balanced.method, balanced.samples, balanced.steps) == ("svdquant_p", 16, 12)
    assert (balanced.guard, balanced.limit, balanced.raised) == ("quality", 17.0, ("W4A8", "W8A8", "16 bit"))
    assert (best.method, best.samples, best.steps) == ("svdquant_p", 32, 20)
    assert (best.guard, best.limit) == ("quality", 24.0)
    assert 6.7e9 < balanced.size == best.size < 6.8e9
    assert balanced.memory == 6 * 2**30
    assert "16 example runs of 12 steps to measure on." in balanced.why


def test_a_card_without_kernels_for_components():
    choice = choose("balanced", replace(FLUX_FACTS, components=False))
    assert choice.method == "svdquant_r"
    assert choice.why[0].endswith(
        "the closest of the 4-bit methods that this card has kernels for (svdquant_p is closer)."
    )


def test_a_calibration_that_is_there_is_taken():
    choice = choose("best", replace(FLUX_FACTS, measured=5))
    assert (choice.samples, choice.steps) == (5, 0)
    assert "Measured on the calibration given, of 5 example runs." in choice.why


def test_fast_needs_no_examples():
    choice = choose("fast", FLUX_FACTS)
    assert (choice.method, choice.samples, choice.guard, choice.budget) == ("svdquant_r", 0, "", "")


def test_smallest_is_smaller_than_any_card_asks_for():
    smallest = choose("smallest", FLUX_FACTS)
    assert (smallest.method, smallest.budget, smallest.guard) == ("", "W2.25", "")
    assert FLUX_FACTS.at(2) < smallest.size < choose("fits 6 GB", FLUX_FACTS).size < FLUX_FACTS.at(4)


def test_a_card_of_8_gb_holds_4_bits_and_a_little_more():
    choice = choose("fits 8 GB", FLUX_FACTS)
    room = 8 * 2**30 - 600_000_000 - 1_065_000_000
    assert (choice.method, choice.guard, choice.limit) == ("svdquant_p", "memory", room)
    assert choice.raised == ("W8A8", "16 bit")
    assert FLUX_FACTS.at(4) < room
    assert choice.why[2] == (
        "6.9 GB for the model: a card of 8 GB, less 0.6 GB for the system and 1.1 GB to sample."
    )
    assert choice.short == "fits8GB"


def test_a_card_of_6_gb_needs_weights_of_three_values():
    choice = choose("fits 6 GB", FLUX_FACTS)
    assert (choice.method, choice.guard, choice.budget) == ("", "", "4777.451MB")
    assert [entry.name for entry in SMALL] == ["robuq A8", "svdquant_r W4A4"]


def test_what_cannot_be_is_refused_with_sizes():
    with pytest.raises(WishError, match="takes 23.8 GB as it is, and with 1.1 GB .* without being quantized"):
        choose("fits 24 GB", replace(FLUX_FACTS, card=2**30))
    video = replace(FLUX_FACTS, room=3_000_000_000)
    expected = (
        r"the smallest this model can be made is 4.3 GB, and with 3.0 GB to sample at this size and "
        r"0.6 GB for the system it needs 7.9 GB\. Take fits 8 GB\. Or connect a smaller latent_image"
    )
    with pytest.raises(WishError, match=expected):
        choose("fits 6 GB", video)
    with pytest.raises(WishError, match=r"it needs 34.9 GB\. Or connect"):
        choose("fits 12 GB", replace(FLUX_FACTS, room=30_000_000_000))
    with pytest.raises(
        WishError, match="unknown wish 'nice'. Wishes: balanced, fast, best, smallest, fits 6"
    ):
        choose("nice", FLUX_FACTS)


def test_few_steps_and_a_cpu_take_fewer():
    schnell = replace(FLUX_FACTS, steps=4)
    assert (choose("best", schnell).samples, choose("best", schnell).steps) == (32, 4)
    slow = choose("balanced", replace(FLUX_FACTS, cpu=True))
    assert (slow.samples, slow.steps) == (8, 8)
    assert "8 example runs of 8 steps to measure on, fewer than with a card, since a CPU is slow." in slow.why


def test_a_card_that_is_too_small_is_told_of_the_wish_that_fits():
    small = replace(FLUX_FACTS, card=8 * 10**9)
    expected = (
        "This card has 8.0 GB: with about 6.7 GB of weights and 1.1 GB to sample ComfyUI will keep a part "
        "in main memory, which is slower. The wish fits 6 GB avoids that."
    )
    assert choose("balanced", small).why[-1] == choose("fast", small).why[-1] == expected
    for fine in (FLUX_FACTS, replace(small, cpu=True)):
        assert not any("main memory" in line for line in choose("balanced", fine).why)


@pytest.mark.parametrize(("card", "gib"), [(2, 1), (8, 2), (24, 6), (80, 16)])
def test_memory_for_statistics_is_a_quarter_of_the_card(card, gib):
    assert choose("balanced", replace(FLUX_FACTS, card=card * 2**30)).memory == gib * 2**30


def test_statistics_are_what_the_docs_say():
    assert 21.5e9 < statistics_bytes(FLUX_FACTS.layers) < 22e9


@pytest.mark.parametrize("bits", [4, 2])
def test_sizes_are_predicted(tiny_state, bits):
    shapes = {k: tuple(v.shape) for k, v in tiny_state.items()}
    layers = [layer for layer in FLUX.layers(shapes) if not layer.weight_only][:6]
    facts = Facts(layers, shapes, 20, 0, 2**30)
    method = by_name({4: "svdquant_r", 2: "robuq"}[bits])
    assert method.config.rank == RANK
    done = [row for _, row in quantize_layers(layers, Tensors(tiny_state), method, method.config)]
    real = facts.whole - sum(2 * row.weights for row in done) + sum(row.nbytes for row in done)
    assert facts.at(bits) == pytest.approx(real, rel=0.01)


def test_every_wish_is_possible_for_some_model():
    huge = replace(FLUX_FACTS, shapes=SHAPES | {"more.weight": (30000, 100000)})
    for wish in WISHES:
        if wish not in ("fits 6 GB", "fits 8 GB", "fits 10 GB"):
            assert choose(wish, huge).method in ("", *METHODS)
