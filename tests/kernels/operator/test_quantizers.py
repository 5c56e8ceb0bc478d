import pytest
import torch

from comfyui_nibble.kernels.operator.quantizers import (
    absmax_scale,
    best_clip_scale,
    code_range,
    dequantize,
    quantize,
)

pytestmark = pytest.mark.quick


def test_signed_codes_never_reach_minus_eight():
    x = torch.tensor([[-7.0, 7.0, -6.6, 0.4]])
    scale = absmax_scale(x, 4, "token")
    assert scale.tolist() == [[1.0]]
    assert quantize(x * 1.2, scale, 4, "token").tolist() == [[-7, 7, -7, 0]]
    assert (code_range(4), code_range(4, unsigned=True), code_range(2), code_range(8)) == (
        (-7, 7),
        (0, 15),
        (-1, 1),
        (-127, 127),
    )


def test_one_bit_is_the_sign():
    x = torch.tensor([[0.0, -0.0, 3.0, -1e-45, -2.0, 1e-45]])
    scale = absmax_scale(x, 1, "token", clip=0.5)
    assert code_range(1) == (-1, 1)
    assert scale.tolist() == [[1.5]]
    assert quantize(x, scale, 1, "token").tolist() == [[1, 1, 1, -1, -1, 1]]
    assert dequantize(quantize(x, scale, 1, "token"), scale, "token").unique().tolist() == [-1.5, 1.5]


def test_rounds_half_to_even():
    assert quantize(torch.tensor([[0.5, 1.5, 2.5, -0.5]]), torch.ones(1, 1), 4, "token").tolist() == [
        [0, 2, 2, 0]
    ]


def test_unsigned_uses_fifteen_steps():
    x = torch.tensor([[0.0, 1.5, 15.0, 7.4]])
    assert quantize(x, absmax_scale(x, 4, "token", unsigned=True), 4, "token", unsigned=True).tolist() == [
        [0, 2, 15, 7]
    ]


@pytest.mark.parametrize(
    ("granularity", "shape"), [("token", (3, 1)), ("channel", (3, 1)), ("group", (3, 2)), ("tensor", (1, 1))]
)
def test_one_scale_for_each_granule(granularity, shape):
    x = torch.randn(3, 128)
    scale = absmax_scale(x, 4, granularity)
    assert tuple(scale.shape) == shape
    error = (dequantize(quantize(x, scale, 4, granularity), scale, granularity) - x).abs()
    assert error.max() <= scale.max() / 2 + 1e-6


def test_zero_rows_give_zero_codes():
    x = torch.zeros(2, 64)
    assert quantize(x, absmax_scale(x, 4, "group"), 4, "group").abs().sum() == 0


def test_best_clip_is_never_worse_than_absmax():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    full = absmax_scale(w, 4, "group")
    best = best_clip_scale(w, 4, "group")
    error = lambda s: (dequantize(quantize(w, s, 4, "group"), s, "group") - w).square().sum()
    assert error(best) < 0.95 * error(full)
