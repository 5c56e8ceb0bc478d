"""What the data sheets allow the transform in the quantizer, at FLUX's 4608 tokens: the target is 1.1 times
the plain quantizer."""

import pytest

from comfyui_nibble.quant_core.evaluation.bench import roofline
from comfyui_nibble.quant_core.evaluation.bench.roofline import (
    A100,
    CARDS,
    H100,
    RTX_3090,
    RTX_4090,
    ratio,
    transform_flops,
)

pytestmark = pytest.mark.quick

M = 4608


def test_bytes_and_products_by_hand():
    assert roofline.quantizer_bytes(M, 3072) == M * (6144 + 1536 + 4)
    assert roofline.quantizer_seconds(RTX_4090, M, 3072) == pytest.approx(35.1e-6, rel=0.01)
    assert roofline.quantizer_seconds(H100, M, 3072) == pytest.approx(10.6e-6, rel=0.01)
    # 4 slices of 24 x 32 take 32 x 32: 1.59 GFLOP become 2.42.
    assert transform_flops(M, 24, 32, 4, padded=False) == 2 * M * 4 * (24 * 24 * 32 + 24 * 32 * 32)
    assert transform_flops(M, 24, 32, 4) == 2 * M * 4 * 32 * 32 * 64
    assert transform_flops(M, 16, 18, 3) == 2 * M * 4 * 16 * 32 * 48


# (p1, p2, slices): cards on which the products take no longer than the memory, by the time of the quantizer
# with the transform over that without it; the others follow with theirs.
WITHIN = {
    (24, 32, 4): (CARDS, {}),
    (48, 64, 1): ((RTX_4090, A100, H100), {RTX_3090: 1.80}),
    (12, 16, 16): (CARDS, {}),
    (16, 18, 4): (CARDS, {}),
    (32, 36, 4): ((RTX_4090, A100, H100), {RTX_3090: 1.80}),
    (48, 64, 4): ((RTX_4090, A100, H100), {RTX_3090: 1.80}),
    (96, 128, 1): ((H100,), {RTX_3090: 3.60, RTX_4090: 1.67, A100: 1.78}),
}


@pytest.mark.parametrize("sizes", WITHIN, ids=str)
def test_transform_within_the_plain_quantizer(sizes):
    within, beyond = WITHIN[sizes]
    assert set(within) | set(beyond) == set(CARDS)
    for card in within:
        assert ratio(card, M, *sizes) == 1.0
    for card, value in beyond.items():
        assert ratio(card, M, *sizes) == pytest.approx(value, abs=0.01)


def test_why_the_products_take_fp16_and_once():
    """tf32 would do for four slices of 3072 channels on three cards; for 12288 it, or a second transform,
    breaks the target."""
    assert ratio(RTX_4090, M, 24, 32, 4, rate=0.5) == 1.0
    assert ratio(RTX_4090, M, 24, 32, 4, rate=0.5, times=2) == pytest.approx(1.67, abs=0.01)
    assert (
        ratio(RTX_4090, M, 48, 64, 4, rate=0.5)
        == ratio(RTX_4090, M, 48, 64, 4, times=2)
        == pytest.approx(1.67, abs=0.01)
    )
    assert ratio(A100, M, 48, 64, 4, rate=0.5) == pytest.approx(1.78, abs=0.01)
    assert ratio(H100, M, 48, 64, 4, rate=0.5) == 1.0
