"""Block-scaled fp4 in the interpreter against `naive`.

The interpreter has no `tl.dot_scaled` of nvfp4: it runs the product's other branch, which decodes both sides
and multiplies in fp32. That the instruction itself is there is the compile gate's business
(test_fp4_gate.py).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from triton.runtime.interpreter import InterpreterBuilder

from comfyui_nibble.kernels.fp4 import launch, naive, refused
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.tests.kernels.layers import LIMIT, inputs
from comfyui_nibble.tests.support import relative_error

HALF, BF16 = torch.float16, torch.bfloat16
FORMATS = ("nvfp4", "nvfp4 given", "mxfp4")


def quantized(x, kind, scale=None):
    """(codes, scales, scale or None) by `naive`. `scale`: the second level of nvfp4, one for each token by
    default."""
    if kind == "mxfp4":
        return (*naive.quantize_mxfp4(x), None)
    return naive.quantize_nvfp4(x, naive.token_scale(x) if scale is None else scale)


def run_quantizer(x, kind, smooth=None, down=None, given=None):
    """The kernel -> codes, scales, token_scale, low."""
    tokens, width = x.shape
    codes = torch.empty(tokens, width // 2, dtype=torch.uint8)
    block, dtype = (32, torch.uint8) if kind == "mxfp4" else (16, torch.float8_e4m3fn)
    scales, token_scale = (
        torch.empty(tokens, width // block, dtype=torch.uint8).view(dtype),
        torch.empty(tokens),
    )
    low = None if down is None else torch.empty(tokens, down.shape[1], dtype=x.dtype)
    launch.quantize_fp4(x, codes, scales, token_scale, low, smooth, down, given)
    return codes, scales, token_scale, low


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    blocks=st.integers(1, 4),
    rank=st.sampled_from([0, 0, 1, 17, 32, 64, 80]),
    smooth=st.booleans(),
    kind=st.sampled_from(FORMATS),
    dtype=st.sampled_from([HALF, BF16]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 2**31),
)
def test_quantizer_equals_naive_bit_for_bit(m, blocks, rank, smooth, kind, dtype, spread, seed):
    k = 64 * blocks
    x = (inputs(m, k, seed=seed) * (spread * inputs(1, k, seed=seed + 1)).exp()).clamp(-6e4, 6e4).to(dtype)
    factor = (0.5 + inputs(1, k, seed=seed + 2)[0].abs()).to(dtype) if smooth else None
    down = inputs(k, rank, dtype, seed + 3) * 1e-3 if rank else None
    tx = x.float() / factor.float() if smooth else x.float()
    given = naive.tensor_scale(tx).reshape(1) * 1.5 if kind == "nvfp4 given" else None
    codes, scales, token_scale, low = run_quantizer(x, kind, factor, down, given)
    want = quantized(tx, kind, given)
    assert torch.equal(codes, want[0])
    assert same_bits(scales, want[1])
    expected = (
        torch.ones(m, 1) if kind == "mxfp4" else want[2].expand(m, 1) if given is None else given.expand(m, 1)
    )
    assert torch.equal(token_scale, expected[:, 0])
    if rank:
        assert relative_error(x.double() @ down.double(), low) < LIMIT[dtype]


def test_every_rounding():
    """Each number of fp16 from 2^-8 on as the largest of its blocks: at a tensor's scale of 1 every tie of
    e4m3, and below it fractions that meet every tie of e2m1."""
    values = torch.arange(0x1C00, 0x7C00, dtype=torch.int16).view(HALF).reshape(-1, 4)
    x = torch.zeros(len(values), 64, dtype=HALF)
    for i, factor in enumerate((1.0, -1 / 3, 0.6, 0.3, -0.15, 0.05)):
        x[:, i::16] = values * factor
    for kind, scale in (("nvfp4 given", torch.ones(1)), ("mxfp4", None)):
        codes, scales, _, _ = run_quantizer(x, kind, given=scale)
        want = quantized(x.float(), kind, scale)
        assert torch.equal(codes, want[0])
        assert same_bits(scales, want[1])


def random_weight(n, k, kind, seed):
    """(codes, scales, scale): any codes, scales from 0 on; nvfp4 with a scale of the tensor or one for each
    out-channel."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8)
    if kind == "mxfp4":
        return codes, torch.randint(118, 130, (n, k // 32), generator=g, dtype=torch.uint8), None
    scales = torch.randint(0, 127, (n, k // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes, scales, torch.rand(n if kind == "nvfp4" else 1, generator=g) * 1e-3 + 1e-3


def run_linear(x, weight, kind, smooth=None, down=None, up=None, bias=None, given=None, dtype=None):
    """Both kernels -> y in the dtype of x or `dtype`."""
    codes, scales, token_scale, low = run_quantizer(x, kind, smooth, down, given)
    y = torch.empty(x.shape[0], weight[0].shape[0], dtype=dtype or x.dtype)
    launch.gemm_fp4(codes, scales, token_scale, *weight, low, up, bias, y)
    return y


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    blocks=st.integers(1, 5),
    rank=st.sampled_from([0, 17, 32]),
    smooth=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from(FORMATS),
    dtype=st.sampled_from([HALF, BF16]),
    seed=st.integers(0, 2**31),
)
def test_product_equals_naive(m, n, blocks, rank, smooth, bias, kind, dtype, seed):
    """Each output to the rounding of fp32 sums, and rounded to 16 bit once."""
    k = 64 * blocks
    x, (codes, scales, scale) = inputs(m, k, dtype, seed), random_weight(n, k, kind, seed)
    factor = (0.5 + inputs(1, k, seed=seed + 2)[0].abs()).to(dtype) if smooth else None
    down, up = (
        (inputs(k, rank, dtype, seed + 3) / 8, inputs(n, rank, dtype, seed + 4)) if rank else (None, None)
    )
    offset = inputs(1, n, dtype, seed + 5)[0] if bias else None
    given = torch.tensor([1e-3]) if kind == "nvfp4 given" else None
    settings = ((codes, scales, scale), kind, factor, down, up, offset, given)
    y = run_linear(x, *settings, dtype=torch.float32)
    assert torch.equal(run_linear(x, *settings), y.to(dtype))
    tx = naive.dequantize(*quantized(x.float() / factor.float() if smooth else x.float(), kind, given))
    low = run_quantizer(x, kind, factor, down, given)[3]
    scale = None if scale is None else scale[:, None]
    terms = tx.abs() @ naive.dequantize(codes, scales, scale).abs().T
    terms += low.double().abs() @ up.double().abs().T if rank else 0
    terms += offset.double().abs() if bias else 0
    assert ((y - naive.linear(tx, codes, scales, scale, low, up, offset)).abs() <= 2e-6 * terms).all()


if hasattr(InterpreterBuilder, "create_dot_scaled"):  # from Triton 3.9 on

    def test_both_branches_of_the_product_agree(monkeypatch):
        """On mxfp4: of e4m3 scales the interpreter has no notion."""
        x, weight = inputs(35, 320, HALF), random_weight(40, 320, "mxfp4", 8)
        decoded, constants = run_linear(x, weight, "mxfp4", dtype=torch.float32), launch.constants
        monkeypatch.setattr(launch, "constants", lambda *args: constants(*args) | {"UPCAST": False})
        assert relative_error(decoded, run_linear(x, weight, "mxfp4", dtype=torch.float32)) < 1e-6


@pytest.mark.parametrize("kind", FORMATS)
def test_extremes(kind):
    k = 192
    x, weight = torch.zeros(8, k, dtype=HALF), random_weight(40, k, kind, 3)
    given = torch.tensor([0.05]) if kind == "nvfp4 given" else None
    bias = inputs(1, 40, HALF)[0]
    assert torch.equal(run_linear(x, weight, kind, bias=bias, given=given), bias.expand(8, -1))  # zeros
    x[:, 5] = torch.tensor([65504.0, -65504.0, 6e-8, -6e-8, 1.0, 1e-3, 100.0, -3.0])  # one value a token
    codes, scales, token_scale, _ = run_quantizer(x, kind, given=given)
    tx = naive.dequantize(*quantized(x.float(), kind, given))
    want = naive.linear(tx, weight[0], weight[1], None if weight[2] is None else weight[2][:, None])
    assert_close(
        run_linear(x, weight, kind, given=given, dtype=torch.float32).double(), want, rtol=1e-6, atol=0
    )
    if kind == "nvfp4":
        assert_close(
            naive.dequantize(codes, scales, token_scale[:, None]).float(), x.float(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rank", "value"), [(0, torch.nan), (17, torch.nan), (0, -torch.inf)])
def test_nan_stays_in_its_token(kind, rank, value):
    k, n = 192, 40
    x, weight = inputs(35, k, HALF), random_weight(n, k, kind, 4)
    down, up = (inputs(k, rank, HALF, 5), inputs(n, rank, HALF, 6)) if rank else (None, None)
    given = torch.tensor([1e-3]) if kind == "nvfp4 given" else None
    whole = run_linear(x, weight, kind, None, down, up, None, given)
    x[7, 70] = value
    y = run_linear(x, weight, kind, None, down, up, None, given)
    assert y[7].isnan().all()
    others = torch.arange(35) != 7
    assert torch.equal(y[others], whole[others])
    _, scales, token_scale, _ = run_quantizer(x, kind, given=given)
    assert (
        token_scale.isnan().tolist() == (~others).tolist()
    )  # whatever the tensor cores make of a block's NaN
    assert naive.decode_scales(scales)[7, 70 // naive.block_of(scales)].isnan()


@pytest.mark.parametrize("kind", FORMATS)
def test_strides_and_no_tokens(kind):
    x, weight, wide = inputs(18, 128, HALF), random_weight(24, 128, kind, 7), random_weight(24, 320, kind, 8)
    given = torch.tensor([1e-3]) if kind == "nvfp4 given" else None
    want = run_linear(x, weight, kind, given=given)
    for part, whole in zip(weight[:2], wide[:2], strict=True):
        whole[:, : part.shape[1]] = part
    sliced = (wide[0][:, :64], wide[1][:, : weight[1].shape[1]], weight[2])
    assert torch.equal(run_linear(torch.cat([x, x], 1)[:, 128:], sliced, kind, given=given), want)
    assert run_linear(x[:0], weight, kind, given=given).shape == (0, 24)


def test_least_and_largest_exponents():
    """e8m0 reaches from 2^-127, below the normal numbers of fp32, to 2^127."""
    x = torch.tensor([2.0**-130, 2.0**-127, 2.0**-125, 2.0**127]).to(BF16)[:, None].expand(4, 64).contiguous()
    for exponents in (torch.tensor([0, 100]), torch.tensor([254, 120])):
        codes = torch.full((2, 32), 0x22, dtype=torch.uint8)  # ones
        weight = codes, exponents.to(torch.uint8)[:, None].expand(2, 2).contiguous(), None
        tx = naive.dequantize(*naive.quantize_mxfp4(x))
        want = naive.linear(tx, *weight).float()  # some beyond fp32 on either side
        assert_close(run_linear(x, weight, "mxfp4", dtype=torch.float32), want, rtol=1e-6, atol=2.0**-140)


def test_what_does_not_fit_is_said():
    y = torch.empty(4, 8, dtype=HALF)
    x, nv, mx = inputs(4, 96, HALF), random_weight(8, 128, "nvfp4", 0), random_weight(8, 128, "mxfp4", 0)
    with pytest.raises(ValueError, match="multiples of 64, not 96"):
        run_quantizer(x, "nvfp4")
    x = inputs(4, 128, HALF)
    with pytest.raises(ValueError, match="no scale of the tensor"):
        run_quantizer(x, "mxfp4", given=torch.ones(1))
    codes, scales, token_scale, _ = run_quantizer(x, "nvfp4")
    with pytest.raises(ValueError, match="one fp4 format"):
        launch.gemm_fp4(codes, scales, token_scale, *mx, None, None, None, y)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        launch.gemm_fp4(codes, scales.float(), token_scale, *nv, None, None, None, y)
    with pytest.raises(ValueError, match="one scale per 16"):
        launch.gemm_fp4(codes, scales[:, :4], token_scale, *nv, None, None, None, y)


def test_who_is_refused():
    assert refused(Target("cuda", 120, (3, 6))) is None
    assert refused(Target("cuda", 100, (3, 9))) is None
    assert "sm_90" in refused(Target("cuda", 90, (3, 6)))
    assert "gfx950" in refused(Target("hip", "gfx950", (3, 6)))
    assert refused(Target("cuda", 100, (3, 5))) == "needs Triton 3.6, found 3.5"
    assert refused(Target("cuda", 121, (3, 7))) == "needs Triton 3.8, found 3.7"
    assert refused(Target("cuda", 120)) == "Triton is not installed"
    assert refused(Target("cuda", 120, trouble="no C compiler")) == "no C compiler"
    few, many = (launch.gemm_tile(Target("cuda", 120, (3, 6)), tokens) for tokens in (64, 65))
    assert (few.bm, many.bm) == (64, 128)
    assert {t.bm for t in launch.tiles(Target("cuda", 103, (3, 6)))} == {128}


def test_fake_versions():
    with FakeTensorMode():
        x, codes = torch.empty(4, 64, dtype=HALF), torch.empty(4, 32, dtype=torch.uint8)
        scales, token_scale, y = (
            torch.empty(4, 2, dtype=torch.uint8),
            torch.empty(4),
            torch.empty(4, 8, dtype=HALF),
        )
        assert launch.quantize_fp4(x, codes, scales, token_scale, None, None, None, None) is None
        weight = torch.empty(8, 32, dtype=torch.uint8), torch.empty(8, 2, dtype=torch.uint8)
        assert launch.gemm_fp4(codes, scales, token_scale, *weight, None, None, None, None, y) is None
