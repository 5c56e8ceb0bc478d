"""Rows of the table of cards, and what a card takes that nobody named."""

import pytest

from comfyui_nibble.kernels.cards import CUDA, HIP, INT4, M8N8K32, MMA, Card, card_of

pytestmark = pytest.mark.quick


def test_cards_with_products_of_int4():
    assert INT4 == (75, 80, 86, 87, 89)
    assert {capability for capability in INT4 if CUDA[capability].int4 == MMA} == {80, 86, 87, 89}
    assert CUDA[75].int4 == M8N8K32


@pytest.mark.parametrize(
    ("arch", "row"),
    [
        ("gfx942", "gfx94"),
        ("gfx950", "gfx950"),
        ("gfx90a", "gfx9"),
        ("gfx1100", "gfx11"),
        ("gfx1030", "gfx1"),
    ],
)
def test_amd_cards_are_found_by_how_their_names_begin(arch, row):
    assert card_of("hip", arch) is HIP[row]


def test_cards_that_nobody_named():
    assert card_of("cuda", 130) == Card(torch_int8=True)
    old = card_of("cuda", 70)
    assert (old.products_16, old.int8, old.int4, old.branch) == (False, False, "", False)
    assert not card_of("hip", "gfx90a").int8
    assert card_of("cpu", "") == Card()
    assert card_of("cpu", "int8") == Card(torch_int8=True)
