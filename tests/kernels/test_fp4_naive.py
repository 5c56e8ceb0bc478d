"""The specification of block-scaled fp4 against values by hand and comfy-kitchen's eager ops."""

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.float_utils import from_blocked
from torch.testing import assert_close

from comfyui_nibble.kernels.fp4 import naive
from comfyui_nibble.tests.support import outlier_tokens

pytestmark = pytest.mark.quick


def test_e2m1_by_hand():
    """Halves go to the even code, whose last bit is 0: 0, 1, 2 and 4."""
    given = [
        0.0,
        0.25,
        0.26,
        0.5,
        0.75,
        1.25,
        1.75,
        2.5,
        2.51,
        3.5,
        4.9,
        5.0,
        5.01,
        6.0,
        1e9,
        torch.inf,
        -0.0,
        -0.25,
        -2.5,
        -9.0,
    ]
    codes = [0, 0, 1, 1, 2, 2, 4, 4, 5, 6, 6, 6, 7, 7, 7, 7, 8, 8, 12, 15]
    assert naive.encode_e2m1(torch.tensor(given)).tolist() == codes
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert naive.decode_e2m1(torch.arange(16)).tolist() == [*values, *(-v for v in values)]
    assert naive.encode_e2m1(naive.decode_e2m1(torch.arange(16))).tolist() == list(range(16))


def test_nvfp4_by_hand():
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([2688.0, -448.0, 1120.0, 300.0])  # a scale of 448 at a tensor's scale of 1
    x[0, 16:19] = torch.tensor([3.0, 0.25, -1.0])  # 3 / 6 = 1/2
    x[0, 32] = 0.005  # a scale that rounds to nothing
    codes, scales, scale = naive.quantize_nvfp4(x)
    assert (scale.item(), scales.float().tolist()) == (1.0, [[448.0, 0.5, 0.0, 0.0]])
    assert codes[0, :2].tolist() == [7 | 10 << 4, 4 | 1 << 4]  # 6, -1; 2.5 -> 2, 0.67 -> 0.5
    assert codes[0, 8:10].tolist() == [7 | 1 << 4, 12]  # 6, 0.5; -2
    assert not codes[0, 16:].any()
    want = torch.zeros(1, 64, dtype=torch.float64)
    want[0, :4] = torch.tensor([2688.0, -448.0, 896.0, 224.0])
    want[0, 16:19] = torch.tensor([3.0, 0.25, -1.0])
    assert torch.equal(naive.dequantize(codes, scales, scale), want)


def test_mxfp4_by_hand():
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([7.9, 4.0, -0.7])  # floor(log2) = 2: scale 1, 7.9 saturates
    x[0, 32:34] = torch.tensor([0.0625, 0.01])  # 2^-4: scale 2^-6
    x[0, 96] = torch.nan
    codes, scales = naive.quantize_mxfp4(x)
    assert scales.tolist() == [[127, 121, 0, 255]]
    assert codes[0, :2].tolist() == [7 | 6 << 4, 9]
    assert codes[0, 16].item() == 6 | 1 << 4
    values = naive.dequantize(codes, scales)
    assert values[0, :3].tolist() == [6.0, 4.0, -0.5]
    assert values[0, 32:34].tolist() == [0.0625, 0.0078125]
    assert not values[0, 34:96].any()
    assert values[0, 96:].isnan().all()
    extreme = torch.tensor([[2.0**-133] + [0.0] * 31, [torch.inf] + [0.0] * 31, [2.0**127] + [0.0] * 31])
    assert naive.quantize_mxfp4(extreme)[1].flatten().tolist() == [0, 255, 252]


def test_linear_by_hand():
    x = torch.tensor([[1.0, 2.0] + [0.0] * 62])
    codes = torch.tensor([[2 | 12 << 4] + [0] * 31], dtype=torch.uint8)  # 1, -2
    scales = torch.full((1, 4), 3.0).to(torch.float8_e4m3fn)
    low, up, bias = torch.tensor([[2.0]]), torch.tensor([[5.0]]), torch.tensor([0.25])
    assert naive.linear(x, codes, scales, torch.tensor(0.5), low, up, bias).item() == (1 - 4) * 1.5 + 10.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_is_comfy_kitchens(dtype):
    """Its scales lie in blocks of 128 x 4, its codes with the even channel in the high nibble unless it is
    told otherwise."""
    x = outlier_tokens(150, 320, seed=1).to(dtype)
    x[3] = 0
    x[:, 48:64] *= 1e-5
    x[7, 17] = torch.finfo(dtype).tiny
    for scale in (naive.tensor_scale(x), torch.tensor(1e-3)):  # the second saturates
        codes, scales, _ = naive.quantize_nvfp4(x, scale)
        theirs, blocked = kitchen.quantize_nvfp4(x, scale, hi_first=False)
        assert torch.equal(codes, theirs)
        natural = from_blocked(blocked.view(torch.uint8), *scales.shape)
        assert torch.equal(scales.view(torch.uint8), natural)
        read = kitchen.dequantize_nvfp4(theirs, scale, blocked, torch.float32, hi_first=False)
        assert_close(naive.dequantize(codes, scales, scale).float(), read, rtol=1e-6, atol=0)
