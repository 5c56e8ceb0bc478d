"""The nvfp4 grid in whole numbers against comfy-kitchen's eager ops and the exact specification of fp4."""

from dataclasses import replace

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.float_utils import from_blocked
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_nibble.kernels.fp4 import naive
from comfyui_nibble.kernels.operator import nvfp4
from comfyui_nibble.kernels.operator.codes import INT, NVFP4, ActivationSpec, WeightSpec, four_bits
from comfyui_nibble.kernels.operator.quantizers import dequantize
from comfyui_nibble.kernels.operator.spec import LinearSpec, PartSpec, SpecError
from comfyui_nibble.tests.support import outlier_tokens

pytestmark = pytest.mark.quick
WEIGHT, EITHER = four_bits(NVFP4)
ACTIVATION = ActivationSpec(group=16, grid=NVFP4)
TENSOR = ActivationSpec(group=16, grid=NVFP4, outer="tensor")


def test_ties_go_to_the_even_code():
    given = [
        0.0,
        0.5,
        0.51,
        1.5,
        2.5,
        3.5,
        5.0,
        5.1,
        7.0,
        10.0,
        10.1,
        12.0,
        1e9,
        torch.inf,
        -0.5,
        -5.0,
        -11.0,
    ]
    want = [0, 0, 1, 2, 2, 4, 4, 6, 8, 8, 12, 12, 12, 12, 0, -4, -12]
    assert nvfp4.nearest(torch.tensor(given)).tolist() == want
    assert nvfp4.nearest(torch.tensor([torch.nan])).isnan().all()
    x = torch.linspace(-8, 8, 100_001)
    assert torch.equal(nvfp4.nearest(2 * x).double() / 2, naive.decode_e2m1(naive.encode_e2m1(x)))


def test_every_byte_is_two_codes():
    packed = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    codes = nvfp4.unpack_e2m1(packed)
    assert torch.equal(
        codes.double() / 2,
        naive.dequantize(packed.view(torch.uint8), torch.ones(2, 16).to(torch.float8_e4m3fn)),
    )
    again = nvfp4.pack_e2m1(codes)
    assert torch.equal(nvfp4.unpack_e2m1(again), codes)
    minus_zero = (packed.view(torch.uint8) & 0x0F == 8) | (packed.view(torch.uint8) >> 4 == 8)
    assert torch.equal(again[~minus_zero], packed[~minus_zero])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_comfy_kitchens_of_each_token(dtype):
    x = outlier_tokens(40, 320, seed=1).to(dtype)
    x[3] = 0
    x[:, 48:64] *= 1e-5
    codes, scale = ACTIVATION.rounded(x.float())
    values = dequantize(codes, scale, "group", 16)
    for row, mine in zip(x, values, strict=True):
        t = row.abs().amax().float().clamp(min=1e-10) / 2688
        theirs, blocked = kitchen.quantize_nvfp4(row[None].float(), t, pad_16x=True, hi_first=False)
        read = kitchen.dequantize_nvfp4(theirs, t, blocked, torch.float32, hi_first=False)[0]
        assert torch.equal(mine, read)


@pytest.mark.parametrize("fixed", [0.0, 2.0**-9 + 2.0**-17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_comfy_kitchens_of_the_tensor(dtype, fixed):
    """Its layout's own division, in the dtype of x, or the scale that a file states."""
    x = outlier_tokens(40, 320, seed=1).to(dtype)
    x[3] = 0
    t = torch.tensor(fixed) if fixed else (torch.amax(x.abs()) / 2688).float()
    codes, scale = replace(TENSOR, fixed=fixed).rounded(x.float(), dtype)
    theirs, blocked = kitchen.quantize_nvfp4(x.float(), t, pad_16x=True, hi_first=False)
    read = kitchen.dequantize_nvfp4(theirs, t, blocked, torch.float32, hi_first=False)[:40]
    assert torch.equal(dequantize(codes, scale, "group", 16), read)


def test_the_scale_of_a_tensor():
    """In bf16 it is ComfyUI's quotient, in fp16 fp32's; zeros and no tokens at all have one."""
    largest = torch.tensor(3.0)
    assert nvfp4.tensor_scale(largest, torch.float32) == largest / 2688
    assert nvfp4.tensor_scale(largest, torch.float16) == largest / 2688
    assert nvfp4.tensor_scale(largest, torch.bfloat16) == (largest.bfloat16() / 2688).float()
    assert nvfp4.tensor_scale(largest, torch.bfloat16) != largest / 2688
    assert not TENSOR.rounded(torch.zeros(3, 32))[0].any()
    assert TENSOR.rounded(torch.zeros(0, 32))[1].shape == (0, 2)
    x = torch.ones(3, 32)
    x[1, 2] = torch.nan
    assert TENSOR.rounded(x)[1].isnan().all()


def test_weights_are_comfy_kitchens_at_a_scale_of_the_tensor():
    """With the largest of 16 at 6 and one power of two for all rows, codes and scales bit for bit."""
    w = outlier_tokens(128, 320, seed=2)
    w[:, 0] = w.abs().amax()  # so that all rows have one power of two
    scale = nvfp4.stored(w.unflatten(-1, (-1, 16)).abs().amax(-1) / nvfp4.TOP)
    e4m3, outer = nvfp4.split(scale)
    assert len(outer.unique()) == 1
    theirs, blocked = kitchen.quantize_nvfp4(w, outer[0], hi_first=False)
    assert torch.equal(e4m3.view(torch.uint8), from_blocked(blocked.view(torch.uint8), *e4m3.shape))
    packed = WEIGHT.pack(WEIGHT.codes(w, scale)).view(torch.uint8)
    values = lambda packed: naive.dequantize(packed, e4m3, outer[:1])
    assert torch.equal(values(packed), values(theirs))


@settings(max_examples=50, deadline=None)
@given(spread=st.sampled_from([0.0, 2.0, 12.0]), level=st.integers(-40, 40), seed=st.integers(0, 2**31))
def test_stored_scales_stay_what_they_are(spread, level, seed):
    g = torch.Generator().manual_seed(seed)
    scale = (spread * torch.randn(7, 20, generator=g)).exp() * 2.0**level
    scale[2] = 0
    once = nvfp4.stored(scale)
    assert torch.equal(nvfp4.stored(once), once)
    e4m3, outer = nvfp4.split(once)
    assert torch.equal(nvfp4.join(e4m3, outer), once)
    assert torch.equal(torch.frexp(outer)[0], torch.full_like(outer, 0.5))
    assert (e4m3.float().amax(-1)[torch.arange(7) != 2] >= 240).all()
    # Above what e4m3 has fewer bits for: 2^-6, where the largest of a row may be 240.
    near = scale > scale.amax(-1, keepdim=True) / 2**13
    assert ((once / scale - 1).abs()[near] <= 1 / 16).all()


def test_four_over_six_takes_the_smaller_error():
    w = torch.randn(64, 320, generator=torch.Generator().manual_seed(3))
    error = lambda scale: (
        (dequantize(WEIGHT.codes(w, scale), scale, "group", 16) - w).unflatten(-1, (-1, 16)).square().sum(-1)
    )
    absmax = w.unflatten(-1, (-1, 16)).abs().amax(-1)
    six, four, chosen = (nvfp4.stored(s) for s in (absmax / 12, absmax / 8, nvfp4.four_over_six(w)))
    assert torch.equal(error(chosen), torch.minimum(error(six), error(four)))
    assert 0.2 < (chosen == four).float().mean() < 0.8
    assert error(chosen).sum() < 0.9 * error(six).sum()
    assert torch.equal(WEIGHT.rounded(w, torch.bfloat16)[1], chosen)


def test_activations_with_either_scale():
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(5))
    x[3] = 0
    error = lambda act: (dequantize(*act.rounded(x), "group", 16) - x).square().sum()
    assert error(EITHER) < 0.9 * error(ACTIVATION)
    scale, absmax = EITHER.rounded(x)[1], x.unflatten(-1, (-1, 16)).abs().amax(-1)
    t = absmax.amax(-1, keepdim=True).clamp(min=1e-10) / 1536
    found = 2 * scale / t
    six, four = ((absmax / largest / t).to(torch.float8_e4m3fn).float() for largest in (6, 4))
    near = lambda a: (found - a).abs() <= 1e-6 * a
    assert (near(six) | near(four)).all()
    assert 0.2 < near(four).float().mean() < 0.8
    assert not EITHER.rounded(x)[0][3].any()


@pytest.mark.parametrize("spec", [ACTIVATION, EITHER])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_in_its_token(value, spec):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    whole = dequantize(*spec.rounded(x), "group", 16)
    x[2, 40] = value
    y = dequantize(*spec.rounded(x), "group", 16)
    assert y[2].isnan().any()
    others = torch.arange(5) != 2
    assert torch.equal(y[others], whole[others])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: WeightSpec(8, "group", 16, NVFP4), "4 bits and a scale each 16 channels, found 8 bits"),
        (lambda: WeightSpec(grid=NVFP4), "found 4 bits, one a group of 64"),
        (lambda: ActivationSpec(4, "token", 16, grid=NVFP4), "one a token of 16"),
        (lambda: ActivationSpec(group=16, clip=0.9, grid=NVFP4), "neither a shift nor a clip"),
        (lambda: ActivationSpec(outer="tensor"), "an outer scale of the tensor goes with nvfp4 and one"),
        (lambda: replace(TENSOR, either=True), "and one scale a group only"),
        (lambda: replace(TENSOR, outer="row"), "unknown outer scale 'row': expected token or tensor"),
        (lambda: replace(TENSOR, fixed=-1.0), "is positive and of the tensor, found -1.0"),
        (lambda: replace(TENSOR, fixed=float("nan")), "is positive and of the tensor, found nan"),
        (lambda: replace(TENSOR, fixed=float("inf")), "is positive and of the tensor, found inf"),
        (lambda: replace(ACTIVATION, fixed=0.5), "is positive and of the tensor, found 0.5"),
        (lambda: ActivationSpec(group=16, unsigned=True, grid=NVFP4), "have a sign"),
        (lambda: ActivationSpec(either=True), "goes with nvfp4 only"),
        (lambda: four_bits("fp4"), "unknown grid 'fp4': expected int or nvfp4"),
        (lambda: PartSpec(0, 64, WEIGHT, None, kronecker=(8, 8)), "integer codes only"),
        (
            lambda: LinearSpec(128, 8, (PartSpec(0, 64, WEIGHT, ACTIVATION), PartSpec(64, 128))),
            "weights of all parts of a layer share one grid",
        ),
    ],
)
def test_contradictions_are_named(make, says):
    with pytest.raises(SpecError, match=says):
        make()
    assert WeightSpec().grid == ActivationSpec().grid == INT
