"""The activation quantizer in Triton's interpreter against `operator.quantizers.quantize_activation`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_nibble.kernels.operator import quantizers
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.quantizers import TINY
from comfyui_nibble.kernels.operator.spec import GELU_SHIFT, ActivationSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.prologue import NOTHING, Gelu, LayerNormModulate
from comfyui_nibble.kernels.quant_activation import launch
from comfyui_nibble.tests.kernels.layers import inputs
from comfyui_nibble.tests.support import relative_error

HALF, BF16 = torch.float16, torch.bfloat16
ROUNDING = {HALF: 5e-4, BF16: 4e-3}  # half a unit in the last place, and fp32 sums
SIGNED = [ActivationSpec(bits=b) for b in (2, 3, 4, 8)]
SIGNS = ActivationSpec(bits=1, clip=0.25)
SHIFTED = ActivationSpec(unsigned=True, shift=GELU_SHIFT)
CLIPPED = [replace(SIGNED[2], clip=0.8), replace(SHIFTED, clip=0.8)]


def token(act):
    return replace(act, granularity="token")


def part_of(width, act, **kwargs):
    return PartSpec(0, width, WeightSpec(granularity="channel"), act, **kwargs)


def smoothing(k, dtype, seed=2):
    return (torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def run(x, part, planes, smooth=None, down=None, prologue=None):
    """The operator on all slices of x, one PartSpec for each: codes (M, K) in the order of channels, scales
    (M, segments), low."""
    act, count, grouped = part.activation, x.shape[1] // part.width, part.activation.granularity == "group"
    codes = torch.full((x.shape[0], x.shape[1] if planes else x.shape[1] // 2), 99, dtype=torch.int8)
    scale = torch.full((x.shape[1] // 64 if grouped else count, x.shape[0]), 99.0)
    low = None if down is None else x.new_full((x.shape[0], count * down.shape[1]), 99.0)
    kind, mod_scale, mod_shift, eps = prologue.operands(slice(None)) if prologue else NOTHING
    launch.quantize_activation(
        x, codes, scale, low, smooth, down, mod_scale, mod_shift, part.width, count, planes, act.bits,
        act.unsigned, grouped,
        part.rotation, act.shift, act.clip, kind, eps,
    )  # fmt: skip
    codes = (
        codes.unflatten(1, (planes, -1)).transpose(1, 2).flatten(1)
        if planes
        else unpack(codes, 4, act.unsigned)
    )
    return codes.short(), scale.T, low


def expected(x, part, smooth=None):
    """The specification on each slice of x."""
    codes, scales = [], []
    for start in range(0, x.shape[1], part.width):
        columns = slice(start, start + part.width)
        c, s = quantizers.quantize_activation(
            x[:, columns], part, None if smooth is None else smooth[columns].float()
        )
        codes.append(c.short())
        scales.append(s)
    return torch.cat(codes, 1), torch.cat(scales, 1)


def assert_equal(x, part, planes, smooth=None):
    codes, scale, _ = run(x, part, planes, smooth)
    want_codes, want_scale = expected(x, part, smooth)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes, want_codes)


def assert_close(got, want, share, scale_error):
    """Codes differ by one step in less than `share` of the places, scales by less than `scale_error` of
    themselves."""
    (codes, scale, *_), (want_codes, want_scale) = got, want
    assert float((scale / want_scale - 1).abs().max()) < scale_error
    steps = (codes - want_codes).abs()
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) < share


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smooth"])
@pytest.mark.parametrize(
    "act",
    [SIGNS, *SIGNED, SHIFTED, *CLIPPED],
    ids=lambda a: f"{'u' if a.unsigned else 's'}{a.bits} clip {a.clip}",
)
def test_equals_the_specification_bit_for_bit(act, smooth, dtype):
    for planes in (0, 1, 2, 4) if act.bits <= 4 else (1, 2, 4):
        for rows, width, chosen in ((15, 192, act), (33, 100, token(act))):
            factors = smoothing(width, dtype) if smooth else None
            assert_equal(inputs(rows, width, dtype), part_of(width, chosen, smooth=smooth), planes, factors)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 15, 16, 33, 70]),
    quads=st.integers(1, 40),
    count=st.integers(1, 3),
    grouped=st.booleans(),
    smooth=st.booleans(),
    act=st.sampled_from([SIGNS, *SIGNED[:3], SHIFTED, *CLIPPED]),
    planes=st.sampled_from([0, 1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_specification_for_any_shape(rows, quads, count, grouped, smooth, act, planes, seed):
    width = 64 * (1 + quads % 4) if grouped else 4 * quads
    x = inputs(rows, count * width, BF16, seed)
    part = part_of(width, act if grouped else token(act), smooth=smooth)
    assert_equal(x, part, planes, smoothing(count * width, BF16, seed) if smooth else None)


def test_rows_of_a_wider_tensor_and_the_right_part_of_a_buffer():
    """Both as the layer launches it: x a slice of columns, the codes of the second part behind those of the
    first, in two planes."""
    wide, part = inputs(5, 320, HALF), part_of(64, SIGNED[2])
    x, codes, scale = wide[:, 192:320], torch.zeros(5, 256, dtype=torch.int8), torch.empty(2, 5)
    launch.quantize_activation(
        x, codes[:, 64:], scale, None, None, None, None, None, 64, 2, 2, 4, False, True, 0, 0.0, 1.0,
        *NOTHING[:1], 0.0
    )  # fmt: skip
    want, want_scale = expected(x, part)
    assert torch.equal(torch.stack([codes[:, 64:128], codes[:, 192:]], 2).flatten(1).short(), want)
    assert torch.equal(scale.T, want_scale)
    assert not codes[:, :64].any()
    assert not codes[:, 128:192].any()


@pytest.mark.parametrize("rotation", [2, 4, 8, 16, 32, 64, 128, 256])
def test_rotation_of_exact_values(rotation):
    for act, rows in ((SIGNED[2], 33), (token(SIGNED[3]), 5)):
        x, part = inputs(rows, 512, HALF), part_of(256, act, rotation=rotation)
        assert_close(run(x, part, 2), expected(x, part), share=0.01, scale_error=1e-5)


@pytest.mark.parametrize("rotation", [2, 4, 8, 16, 32, 64, 128, 256])
def test_rotation_after_smoothing_rounds_to_bf16(rotation):
    x, part, factors = (
        inputs(33, 512, BF16),
        part_of(256, SIGNED[2], rotation=rotation, smooth=True),
        smoothing(512, BF16),
    )
    assert_close(run(x, part, 2, factors), expected(x, part, factors), share=0.01, scale_error=0.01)


@pytest.mark.quick
def test_rotation_with_a_tail():
    for width, rotation in ((48, 16), (72, 8), (384, 128), (80, 16)):
        x, part = inputs(7, 2 * width, BF16), part_of(width, token(SIGNED[2]), rotation=rotation)
        assert_close(run(x, part, 1), expected(x, part), share=0.01, scale_error=1e-5)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("rank", [1, 17, 64])
def test_low_rank_is_the_product_of_the_raw_x(rank, dtype):
    for width, count, act in ((192, 1, SIGNED[2]), (64, 3, SIGNED[2]), (100, 2, token(SHIFTED))):
        x, down, factors = (
            inputs(33, width * count, dtype),
            inputs(width * count, rank, dtype, 5),
            smoothing(width * count, dtype),
        )
        part = part_of(width, act, smooth=True, rank=rank)
        codes, _, low = run(x, part, 2, factors, down)
        parts = zip(x.double().split(width, 1), down.double().split(width), strict=True)
        assert relative_error(torch.cat([a @ b for a, b in parts], 1), low) < ROUNDING[dtype]
        assert torch.equal(codes, expected(x, part, factors)[0])


def modulation(batches, k, dtype):
    return LayerNormModulate(0.3 * inputs(batches, k, dtype, 11), 0.3 * inputs(batches, k, dtype, 12))


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["token", "group"])
def test_fused_gelu_equals_gelu_before(grouped, dtype):
    act = SHIFTED if grouped else token(SHIFTED)
    for rows, width, count in ((33, 192, 1), (5, 64, 3)):
        x, part = 2 * inputs(rows, width * count, dtype), part_of(width, act)
        assert_close(
            run(x, part, 2, prologue=Gelu()), expected(Gelu()(x), part), share=0.005, scale_error=0.01
        )


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("batches", [1, 3])
def test_fused_layernorm_equals_layernorm_before(batches, dtype):
    for width, count, act in ((192, 1, SIGNED[2]), (64, 3, SIGNED[2]), (100, 2, token(SIGNED[2]))):
        x = 3 * inputs(33, width * count, dtype) + 40  # a mean far above the spread
        before, part, down = (
            modulation(batches, width * count, dtype),
            part_of(width, act, rank=8),
            inputs(width * count, 8, dtype, 3),
        )
        codes, scale, low = run(x, part, 1, down=down, prologue=before)
        plain = before(x)
        assert_close((codes, scale), expected(plain, part), share=0.005, scale_error=0.01)
        products = zip(plain.double().split(width, 1), down.double().split(width), strict=True)
        assert relative_error(torch.cat([a @ b for a, b in products], 1), low) < 2 * ROUNDING[dtype]


@pytest.mark.quick
@pytest.mark.parametrize("act", [SIGNED[2], token(SHIFTED)], ids=["group", "token"])
@pytest.mark.parametrize("before", [None, Gelu(), modulation(1, 192, HALF)], ids=["", "gelu", "layernorm"])
def test_nan_stays_in_its_token(act, before):
    x = inputs(33, 192, HALF)
    x[20, 70] = torch.nan
    codes, scale, _ = run(x, part_of(192, act), 2, prologue=before)
    lost = torch.zeros_like(scale, dtype=torch.bool)
    lost[
        20,
        (1 if act.granularity == "group" else 0)
        if not isinstance(before, LayerNormModulate)
        else slice(None),
    ] = True
    assert torch.equal(scale.isnan(), lost)
    x[20] = 0
    whole = torch.arange(33) != 20
    assert torch.equal(codes[whole], run(x, part_of(192, act), 2, prologue=before)[0][whole])


@pytest.mark.quick
def test_zero_and_outlier_rows():
    for act in (SIGNED[2], token(SIGNED[3])):
        x, part = inputs(17, 192, HALF), part_of(192, act)
        x[3], x[16] = 0, 0
        x[5, 7], x[6, 100] = 65504, -65504
        x[8] = 6e-8  # subnormal
        assert_equal(x, part, 2)
        codes, scale, _ = run(x, part, 2)
        assert not codes[[3, 16]].any()
        assert torch.equal(scale[3], torch.full_like(scale[3], TINY) / (2 ** (act.bits - 1) - 1))
        assert abs(int(codes[5, 7])) == 2 ** (act.bits - 1) - 1


def test_one_bit_of_what_underflows_in_the_division():
    """-2e-45 / 1.5 is a zero in fp32 and so counts as positive on both sides; a value of x keeps its sign at
    any scale."""
    x = inputs(3, 128, BF16)
    x[0, :5] = torch.tensor([0.0, -0.0, -1e-39, 1e-39, -2e-45])
    for act in (SIGNS, token(SIGNS)):
        for planes in (0, 2):
            assert_equal(x, part_of(128, act), planes)
            assert_equal(x, part_of(128, act, smooth=True), planes, smoothing(128, BF16))
    codes, scale, _ = run(x, part_of(128, token(SIGNS)), 1)
    assert codes[0, :4].tolist() == [1, 1, -1, 1]
    assert torch.equal(scale[:, 0], x.float().abs().amax(1) * 0.25)


@pytest.mark.quick
def test_no_token_is_no_launch():
    codes, scale, low = run(inputs(0, 128, HALF), part_of(128, SIGNED[2]), 2, down=inputs(128, 8, HALF))
    assert (codes.shape, scale.shape, low.shape) == ((0, 128), (0, 2), (0, 8))
