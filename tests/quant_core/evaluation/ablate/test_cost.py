from dataclasses import replace
from fractions import Fraction

import pytest

from comfyui_nibble.kernels.operator.spec import LinearSpec, PartSpec
from comfyui_nibble.quant_core.evaluation.ablate.cost import beside, relative
from comfyui_nibble.quant_core.evaluation.ablate.splitquant import cost_at, untrained
from comfyui_nibble.quant_core.methods import METHODS

pytestmark = pytest.mark.quick


def test_multiply_adds_of_each_piece():
    """A slice X (p1, p2) as P1^T X P2: p1 p1 p2 and p1 p2 p2. A low rank: x D and (x D) U. A fast Hadamard:
    log2 of the block a channel."""
    learned = LinearSpec(768, 100, (PartSpec(0, 768, kronecker=(12, 16)),))
    assert beside(learned) == 4 * (12 * 12 * 16 + 12 * 16 * 16)
    assert beside(replace(learned, parts=(PartSpec(0, 768, kronecker=(12, 16), per_slice=True),))) == beside(
        learned
    )
    assert beside(LinearSpec(256, 100, (PartSpec(0, 256, rotation=64),))) == 256 * 6
    assert beside(LinearSpec(256, 100, (PartSpec(0, 256, rank=32),))) == 32 * 256 + 32 * 100
    two = LinearSpec(512, 100, (PartSpec(0, 256, rank=8, rotation=256), PartSpec(256, 512, rank=8)))
    assert beside(two) == 256 * 8 + 8 * 512 + 2 * 8 * 100
    assert beside(LinearSpec(256, 100, (PartSpec(0, 256, smooth=True),))) == 0


def test_mean_over_layers_is_weighted_by_products():
    one, two = (LinearSpec(256, n, (PartSpec(0, 256, kronecker=(16, 16)),)) for n in (256, 768))
    weight_only = LinearSpec(256, 10_000, (PartSpec(0, 256, activation=None),))
    assert relative([one, two, weight_only]) == Fraction(2 * 256 * 32, 256 * 256 + 256 * 768)


def test_costs_of_a_wide_layer():
    """3.6, 1.8 and 0.9 % at 1, 4 and 16 slices of 3072 channels; a low rank of 32 costs 2.1 %."""
    costs = {
        slices: cost_at(untrained((slices, "shared", "hadamard", "token", False)).method)
        for slices in (1, 4, 16)
    }
    assert costs == {1: (48 + 64) / 3072, 4: (24 + 32) / 3072, 16: (12 + 16) / 3072}
    assert cost_at(METHODS["splitquant_4"]) == (24 + 32) / 3072
    assert cost_at(METHODS["splitquant"]) == pytest.approx(8 / 3072)
    assert cost_at(METHODS["svdquant"]) == pytest.approx(64 / 3072)
    assert cost_at(METHODS["svdquant_r"]) == pytest.approx((64 + 8) / 3072)
    assert cost_at(METHODS["convrot"]) == pytest.approx(8 / 3072)
