"""Zero points as a low rank: the dequantized weight is the same, and so are codes, scales and zeros after the
way back."""

import pytest
import torch

from comfyui_nibble.kernels.operator.packing import pack, unpack
from comfyui_nibble.kernels.operator.spec import LinearSpec, PartSpec
from comfyui_nibble.quant_core.formats.zero_points import (
    offset_columns,
    signed,
    without_zero_points,
    zeros_of,
)
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer

pytestmark = pytest.mark.quick

N, K, G = 24, 256, 64


def example(points, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=g).to(torch.uint8)
    scale = (torch.rand(N, K // G, generator=g) * 0.1 + 0.01).to(dtype)
    low, high = points
    zero = (-scale.float() * (torch.rand(scale.shape, generator=g) * (high - low) + low)).to(dtype)
    return codes, scale, zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("points", "columns"), [((7, 7), 1), ((4.1, 15.9), 1), ((0, 3), 2), ((-20, 30), 2)])
def test_both_ways(points, columns, dtype):
    codes, scale, zero = example(points, dtype)
    weight, weight_scale, down, up = without_zero_points(pack(codes, 4), scale, zero, G, dtype)
    rank = columns * K // G
    assert (down.shape, up.shape, down.dtype, up.dtype) == ((K, rank), (N, rank), dtype, dtype)
    spec = LinearSpec(K, N, (PartSpec(0, K, activation=None, rank=rank),), bias=False)
    layer = QuantizedLayer(
        "x", spec, {"weight": weight, "weight_scale": weight_scale, "proj_down": down, "proj_up": up}
    )
    wanted = (codes.double().view(N, -1, G) * scale.double()[..., None] + zero.double()[..., None]).view(N, K)
    # In fp64 the parts are exact, so their sum is the weight to the last bit of fp64.
    parts = layer.dequantize().double()
    assert torch.allclose(parts, wanted, rtol=0, atol=2e-7)
    assert torch.equal(
        down.double() @ up.double().T, (zero.double() + 8 * scale.double()).repeat_interleave(G, 1).T
    )
    assert torch.equal(zeros_of(weight_scale, down, up, G), zero.float())
    assert torch.equal(unpack(signed(weight), 4, unsigned=True), codes)


def test_symmetric_codes_need_no_low_rank():
    codes, scale, _ = example((7, 7), torch.bfloat16)
    zero = (-8 * scale.float()).bfloat16()
    assert offset_columns(scale, zero, torch.bfloat16) == 0
    _, weight_scale, down, up = without_zero_points(pack(codes, 4), scale, zero, G, torch.bfloat16)
    assert down is up is None
    assert torch.equal(zeros_of(weight_scale, None, None, G), zero.float())


def test_what_is_no_offset_of_groups():
    codes, scale, zero = example((7, 7), torch.bfloat16)
    _, weight_scale, down, up = without_zero_points(pack(codes, 4), scale, zero, G, torch.bfloat16)
    for other in (down.roll(1, 0), 2 * down, torch.cat([down, down, down], 1)):
        with pytest.raises(ValueError, match="no offset for each group"):
            zeros_of(weight_scale, other, up, G)
