"""The whole operator in Triton's interpreter against `naive.quant_linear`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comfyui_nibble.kernels import plan
from comfyui_nibble.kernels.dispatch import ROW_LIMIT, choose
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.prologue import Gelu, LayerNormModulate
from comfyui_nibble.kernels.quant_linear import launch, naive
from comfyui_nibble.kernels.target import Target, interpreter
from comfyui_nibble.tests.kernels.layers import (
    CHANNEL,
    G64_ACT,
    G64_WEIGHT,
    LIMIT,
    TOKEN,
    UNSIGNED,
    check_on_equal_codes,
    inputs,
    output_error,
    random_tensors,
    side_by_side,
    spec_of,
    with_branches,
)
from comfyui_nibble.tests.support import relative_error

HALF, BF16 = torch.float16, torch.bfloat16
DTYPES = st.sampled_from([HALF, BF16])
ADA = Target("cuda", 89, (3, 6))
ACT8, WEIGHT8 = ActivationSpec(bits=8), WeightSpec(bits=8)


def run(x, spec, tensors, lora=(), prologue=None):
    target = interpreter()
    assert choose(spec, target).path in ("int8 tensor cores", "weight-only kernel")
    return with_branches(x, spec, tensors, lora, prologue, target)


def check(m, spec, dtype=HALF, lora=(), seed=0):
    tensors, x = random_tensors(spec, seed, dtype=dtype), inputs(m, spec.in_features, dtype, seed)
    y = run(x, spec, tensors, lora)
    assert y.dtype == dtype
    assert output_error(y, x, spec, tensors, lora) < LIMIT[dtype]


def branch(spec, rank, rows, first, dtype=HALF, seed=7):
    """A LoRA branch on the out-channels first..first + rows."""
    return inputs(rank, spec.in_features, dtype, seed), inputs(rows, rank, dtype, seed + 1) / 4, first


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    groups=st.integers(1, 5),
    tail=st.sampled_from([0, 8, 36]),
    rank=st.sampled_from([0, 0, 1, 17, 32, 64, 65, 80]),
    weight_bits=st.sampled_from([2, 4, 8]),
    act=st.sampled_from([ActivationSpec(bits=b) for b in (1, 2, 3, 4, 8)] + [UNSIGNED]),
    grouped=st.tuples(st.booleans(), st.booleans()),
    smooth=st.booleans(),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_equals_naive_for_any_layer(
    m, n, groups, tail, rank, weight_bits, act, grouped, smooth, bias, dtype, seed
):
    assume(m * n >= 32 or not rank)  # below, one output's rounding of the low rank may reach the limit
    act = act if grouped[0] else replace(act, granularity="token")
    weight = WeightSpec(weight_bits, "group" if grouped[1] else "channel")
    k = 64 * groups if any(grouped) else 64 * groups - tail
    check(m, spec_of(k, n, act, weight, bias, smooth=smooth, rank=rank), dtype, seed=seed)


@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(32, 70),
    widths=st.lists(st.sampled_from([64, 128]), min_size=2, max_size=4),
    bits=st.sampled_from([(4, 4), (8, 8), (4, 8)]),
    rank=st.sampled_from([0, 5, 80]),
    grouped=st.tuples(st.booleans(), st.booleans()),
    unsigned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_naive_for_any_parts(m, n, widths, bits, rank, grouped, unsigned, seed):
    weight = WeightSpec(bits[0], "group" if grouped[1] else "channel")
    first = ActivationSpec(bits[1], "group" if grouped[0] else "token")
    last = replace(UNSIGNED, granularity=first.granularity) if unsigned else first
    acts = [first] * (len(widths) - 1) + [last]
    check(
        m,
        side_by_side(n, *((w, a, weight) for w, a in zip(widths, acts, strict=True)), smooth=True, rank=rank),
        BF16,
        seed=seed,
    )


SLICES = {
    "4 equal": ([64] * 4, 1, 1),
    "unequal": ([64, 192, 192, 64], 1, 3),
    "8": ([64] * 8, 1, 1),
    "9": ([64] * 9, 2, 2),
}


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("name", SLICES)
def test_slices(name, rank):
    widths, launches, runs = SLICES[name]
    spec = side_by_side(48, *((w, TOKEN, CHANNEL) for w in widths), rank=rank)
    lowered = plan.lower(spec, interpreter())
    assert (len(lowered), sum(len(g.runs) for g in lowered)) == (launches, runs)
    assert lowered[0].scales == plan.SLICE
    check(33, spec)


def test_an_8_bit_slice_among_4_bit_ones():
    """8-bit codes of x are one launch with the others where all go as int8, and a launch of their own beside
    native INT4."""
    wide = ActivationSpec(bits=8, granularity="token")
    spec = side_by_side(48, (64, TOKEN, CHANNEL), (64, wide, CHANNEL), (128, TOKEN, CHANNEL), rank=8)
    (one,) = plan.lower(spec, interpreter())
    assert (one.kernel, one.planes, one.ends, one.block) == ("gemm_int8", 2, (32, 64, 128), 32)
    assert [(g.kernel, g.planes, g.start, g.width) for g in plan.lower(spec, ADA)] == [
        ("gemm_s4s4", 0, 0, 64), ("gemm_int8", 2, 64, 64), ("gemm_s4s4", 0, 128, 128),
    ]  # fmt: skip
    check(33, spec)


def test_an_8_bit_weight_slice_is_a_launch_of_its_own():
    spec = side_by_side(
        48, (64, TOKEN, CHANNEL), (64, TOKEN, WeightSpec(8, "channel")), (64, TOKEN, CHANNEL), rank=8
    )
    assert [(g.planes, g.column) for g in plan.lower(spec, interpreter())] == [(2, 0), (1, 32), (2, 96)]
    check(33, spec)


PARTS = {
    "svdquant": side_by_side(48, (64, G64_ACT, G64_WEIGHT), (192, UNSIGNED, G64_WEIGHT), smooth=True, rank=8),
    "rtn": side_by_side(48, (64, TOKEN, CHANNEL), (192, TOKEN, CHANNEL)),
    "rank 70": side_by_side(48, *[(64, TOKEN, CHANNEL)] * 3, rank=70),
    "group and channel": side_by_side(48, (64, G64_ACT, G64_WEIGHT), (192, TOKEN, CHANNEL), rank=8),
    "mixed scales": side_by_side(
        48, (64, TOKEN, G64_WEIGHT), (128, TOKEN, G64_WEIGHT), (64, G64_ACT, CHANNEL), rank=70
    ),
}


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_parts(name, dtype):
    check(17, PARTS[name], dtype)


LORA_LAYERS = PARTS | {
    "rank 0": spec_of(192, 48),
    "rank 32": spec_of(192, 48, rank=32, smooth=True),
    "weights only": spec_of(192, 48, act=None),
}


@pytest.mark.parametrize("name", LORA_LAYERS)
def test_lora_branches_with_row_offsets(name):
    spec = LORA_LAYERS[name]
    lora = [
        branch(spec, 4, 16, 0, seed=7),
        branch(spec, 9, 16, 32, seed=9),
        branch(spec, 1, 48, 0, seed=11),
        branch(spec, 70, 5, 20, seed=13),
    ]
    check(19, spec, lora=lora)
    check(19, spec, lora=lora[:2])


def test_lora_in_another_dtype():
    spec = spec_of(128, 48, rank=8)
    lora, tensors, x = (
        [branch(spec, 4, 16, 16, torch.float32)],
        random_tensors(spec, dtype=BF16),
        inputs(9, 128, BF16),
    )
    assert output_error(run(x, spec, tensors, lora), x, spec, tensors, lora) < LIMIT[BF16]


@pytest.mark.arithmetic
@pytest.mark.parametrize("rotation", [2, 16, 128, 256])
def test_rotation(rotation):
    """The sums of a rotation are in fp32, in another order than naive's; of two fp16 values many lie on the
    edge of two codes."""
    spec = spec_of(512, 48, TOKEN, CHANNEL, rotation=rotation)
    check_on_equal_codes(inputs(33, 512, HALF), spec, random_tensors(spec, dtype=HALF))


@pytest.mark.parametrize(("codes", "bits"), [(-8, 4), (7, 4), (0, 4), (-128, 8), (127, 8), (-2, 2), (1, 2)])
def test_extreme_codes(codes, bits):
    for act, weight in (
        (ActivationSpec(bits=8, granularity="token"), WeightSpec(bits, "channel")),
        (ACT8, WeightSpec(bits)),
    ):
        spec = spec_of(192, 40, act, weight, bias=False)
        tensors, x = random_tensors(spec, codes=codes, dtype=BF16), torch.ones(3, 192, dtype=BF16)
        x[1], x[2] = -1, 0
        y, want = run(x, spec, tensors), naive.quant_linear(x, spec, tensors)
        assert not y[2].any()
        assert torch.equal(y, want.to(BF16))


@pytest.mark.arithmetic
def test_before_is_fused_or_called():
    """Two runs of the quantizer cannot share a LayerNorm, a low rank above the limit needs the normed x
    itself. In the quantizer what stands before is in fp32, as a module of its own it rounds to bf16."""
    for spec in (
        spec_of(192, 40, rank=8),
        spec_of(192, 40, rank=80),
        PARTS["svdquant"],
        spec_of(192, 40, act=None),
    ):
        x, k = inputs(12, spec.in_features, BF16), spec.in_features
        tensors = random_tensors(spec, dtype=BF16)
        for before in (Gelu(), LayerNormModulate(inputs(3, k, BF16, 2) / 4, inputs(3, k, BF16, 3) / 4)):
            if spec.weight_only:
                assert (
                    output_error(run(x, spec, tensors, prologue=before), before(x), spec, tensors)
                    < LIMIT[BF16]
                )
            else:
                check_on_equal_codes(
                    x, spec, tensors, prologue=before, roundings=1 if isinstance(before, Gelu) else 2
                )


@pytest.mark.parametrize(
    "spec",
    [spec_of(128, 24, rank=8), spec_of(128, 24, rank=80), PARTS["rtn"], spec_of(128, 24, act=None, rank=8)],
    ids=str,
)
def test_no_tokens(spec):
    y = run(inputs(0, spec.in_features, HALF), spec, random_tensors(spec, dtype=HALF))
    assert (y.shape, y.dtype) == ((0, spec.out_features), HALF)


@pytest.mark.parametrize(
    "spec",
    [spec_of(128, 24, rank=8), spec_of(128, 24, rank=80), PARTS["mixed scales"], spec_of(128, 24, act=None)],
    ids=str,
)
def test_any_strides_and_dimensions(spec):
    k, tensors = spec.in_features, random_tensors(spec, dtype=HALF)
    x = inputs(18, k, HALF)
    want = run(x, spec, tensors)
    assert torch.equal(run(torch.cat([x, x], 1)[:, k:], spec, tensors), want)
    assert torch.equal(run(x.T.contiguous().T, spec, tensors), want)
    assert torch.equal(run(x.view(2, 3, 3, k), spec, tensors), want.view(2, 3, 3, -1))
    assert torch.equal(run(x[0], spec, tensors), want[0])
    turned = run(
        x.view(2, 9, k).transpose(0, 1), spec, tensors
    )  # rows in another order, of which torch.mm takes several at a time
    assert relative_error(want.view(2, 9, -1).transpose(0, 1), turned) < LIMIT[HALF]


def test_nan_stays_in_its_token():
    for spec in (spec_of(192, 40, rank=8), PARTS["rtn"], spec_of(192, 40, act=None)):
        x, tensors = inputs(20, spec.in_features, HALF), random_tensors(spec, dtype=HALF)
        x[7, 3] = torch.nan
        lost = run(x, spec, tensors).isnan()
        assert lost[7].all()
        assert int(lost.sum()) == spec.out_features


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    quads=st.integers(1, 60),
    bits=st.sampled_from([2, 4, 8]),
    grouped=st.booleans(),
    rank=st.sampled_from([0, 0, 9]),
    smooth=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_weight_only(m, n, quads, bits, grouped, rank, smooth, dtype, seed):
    """Above ROW_LIMIT rows the eager path runs, whose dequantized weights and products are rounded to 16
    bit."""
    assume(m * n >= 32)
    k = 64 * (1 + quads % 4) if grouped else 4 * quads
    spec = spec_of(k, n, None, WeightSpec(bits, "group" if grouped else "channel"), smooth=smooth, rank=rank)
    tensors, x = random_tensors(spec, seed, dtype=dtype), inputs(m, k, dtype, seed)
    if smooth:  # x / smooth is rounded by torch, here not at all
        tensors["smooth_factor"] = torch.full_like(tensors["smooth_factor"], 2)
    limit = 2 * LIMIT[dtype] if m > ROW_LIMIT or rank else LIMIT[dtype]
    assert output_error(run(x, spec, tensors), x, spec, tensors) < limit


def test_weight_only_parts_add_up():
    spec = LinearSpec(
        192,
        40,
        (PartSpec(0, 64, rank=3, activation=None), PartSpec(64, 192, WEIGHT8, None, rotation=64, rank=3)),
    )
    tensors, x = random_tensors(spec, dtype=BF16), inputs(5, 192, BF16)
    assert output_error(run(x, spec, tensors), x, spec, tensors) < 2 * LIMIT[BF16]


def product(codes, scale, tensors, low=None, **changed):
    """launch.gemm on the launch of a layer into fp32, with some settings changed."""
    y = torch.zeros(codes.shape[0], tensors["weight"].shape[0])
    chosen = {
        "kernel": "gemm_int8",
        "planes": 2,
        "scales": plan.GROUP,
        "swap": False,
        "block": 32,
        "ends": (64,),
        "act_grouped": True,
        **changed,
    }
    up = None if low is None else tensors["proj_up"]
    launch.gemm(
        codes,
        scale,
        tensors["weight"],
        tensors["weight_scale"],
        low,
        up,
        tensors["bias"],
        y,
        *chosen.values(),
        False,
    )
    return y


LAUNCHES = {
    "channel": (spec_of(160, 33, TOKEN, CHANNEL, rank=17),
    {"scales": plan.CHANNEL, "block": 0, "act_grouped": False}),
    "group": (spec_of(192, 33, rank=17), {}),
    "group 2 bit": (spec_of(192, 33, weight=WeightSpec(2), rank=17), {"planes": 4, "block": 16}),
    "group 8 bit": (spec_of(192, 33, weight=WEIGHT8, rank=17), {"planes": 1, "block": 64}),
    "slice": (side_by_side(33, (64, TOKEN, CHANNEL), (128, TOKEN, CHANNEL), rank=17),
    {"scales": plan.SLICE, "ends": (32, 96), "act_grouped": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_swapped_operands_give_the_same_and_magic_conversion_too(name):
    spec, settings = LAUNCHES[name]
    g = torch.Generator().manual_seed(0)
    tensors = random_tensors(spec, dtype=HALF)
    codes = torch.randint(-127, 128, (35, spec.in_features), generator=g, dtype=torch.int8)
    scale = torch.rand(plan.lower(spec, interpreter())[0].act_segments, 35, generator=g) / 64
    low = inputs(35, spec.rank * len(spec.parts), HALF)
    straight = product(codes, scale, tensors, **settings)
    assert torch.equal(product(codes, scale, tensors, swap=True, **settings), straight)
    with_low = product(codes, scale, tensors, low, **settings)
    assert relative_error(with_low, product(codes, scale, tensors, low, swap=True, **settings)) < 1e-6
    assert relative_error(with_low, straight + low.float() @ tensors["proj_up"].float().T) < 1e-6
    wide = tensors | {"weight_scale": tensors["weight_scale"].float()}
    assert relative_error(product(codes, scale, wide, **settings), straight) < 1e-6
