"""The activation quantizer with a learned Kronecker transform, in Triton's interpreter, against
`operator.quantizers.quantize_activation`.

The products take fp16 scaled to its range. Next to the fp32 specification some codes are a step off, where a
value was about to round either way: 0.06 % of 4-bit codes and 1 % of 8-bit codes for orthogonal factors.
"""

import pytest
import torch

from comfyui_nibble.kernels.operator import quantizers
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.quantizers import TINY
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.prologue import NOTHING, Gelu, LayerNormModulate
from comfyui_nibble.kernels.quant_activation import launch
from comfyui_nibble.quant_core.methods.factors import start_factor
from comfyui_nibble.tests.kernels.layers import inputs

HALF, BF16 = torch.float16, torch.bfloat16
FLIPS = {1: 6e-4, 2: 3e-4, 3: 6e-4, 4: 1.5e-3, 8: 0.016}  # share of codes that may be a step off
ROUNDING = 1e-3  # of the largest |z| of a token, two roundings to 11 bits in each product
FOUR = ActivationSpec(4, "token")


def layer_of(sizes, slices, act=FOUR, parts=1, smooth=True, per_slice=False):
    width = sizes[0] * sizes[1] * slices
    weight = WeightSpec(4, "channel")
    part = lambda i: PartSpec(
        i * width, (i + 1) * width, weight, act, smooth=smooth, kronecker=sizes, per_slice=per_slice
    )
    return LinearSpec(parts * width, 8, tuple(map(part, range(parts))))


def factors_of(spec, gain=1.0, seed=0):
    """Orthogonal factors times `gain`, flat as the layer holds them."""
    pairs = [(part, i) for part in spec.parts for i in range(part.pairs)]
    return torch.cat(
        [gain * start_factor(p, seed + 7 * i + p).flatten() for part, i in pairs for p in part.kronecker]
    )


def run(x, spec, transform, smooth=None, planes=2, prologue=None):
    """The operator on alike parts: codes (M, K) in the order of channels, scales (M, parts)."""
    part, count = spec.parts[0], len(spec.parts)
    (p1, p2), act = part.kronecker, part.activation
    codes = torch.full((x.shape[0], x.shape[1] if planes else x.shape[1] // 2), 99, dtype=torch.int8)
    scale = torch.full((count, x.shape[0]), 99.0)
    kind, mod_scale, mod_shift, eps = prologue.operands(slice(None)) if prologue else NOTHING
    launch.quantize_kronecker(
        x, codes, scale, smooth, transform, mod_scale, mod_shift, count, part.width // (p1 * p2), p1, p2,
        part.per_slice, planes, act.bits,
        act.unsigned, act.clip, kind, eps,
    )  # fmt: skip
    codes = (
        codes.unflatten(1, (planes, -1)).transpose(1, 2).flatten(1)
        if planes
        else unpack(codes, 4, act.unsigned)
    )
    return codes.short(), scale.T


def expected(x, spec, transform, smooth=None):
    out = []
    for part, factors in zip(spec.parts, spec.factors({"transform": transform}), strict=True):
        columns = slice(part.start, part.stop)
        out.append(
            quantizers.quantize_activation(
                x[:, columns], part, None if smooth is None else smooth[columns].float(), factors
            )
        )
    return torch.cat([codes.short() for codes, _ in out], 1), torch.cat([scale for _, scale in out], 1)


def check(got, want, bits=4):
    (codes, scale), (want_codes, want_scale) = got, want
    assert float((scale / want_scale - 1).abs().max()) < ROUNDING
    steps = (codes - want_codes).abs()
    assert int(steps.max()) <= (2 if bits == 1 else 1)
    assert float((steps > 0).float().mean()) < FLIPS[bits]


def tokens(m, k, dtype, seed=1):
    """With channels of very different size, as a smoothing is for, and the smoothing: (x, s)."""
    size = torch.exp(1.5 * inputs(1, k, seed=seed + 1))
    return (inputs(m, k, seed=seed) * size).to(dtype), size[0].sqrt()


# The sizes of FLUX and PixArt: 3072, 1152, 4608 and 12288 channels in 1, 4 or 16 slices. Tails: 7 tokens are
# two programs and a third.
SIZES = [
    ((24, 32), 4),
    ((16, 18), 4),
    ((32, 36), 1),
    ((8, 9), 16),
    ((48, 64), 1),
    ((12, 16), 3),
    ((16, 16), 2),
]


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize(("sizes", "slices"), SIZES)
def test_agrees_with_the_specification(sizes, slices, dtype):
    for planes in (0, 1, 2, 4)[sizes[1] % 2 :]:
        spec = layer_of(sizes, slices)
        x, smooth = tokens(7, spec.in_features, dtype)
        transform = factors_of(spec)
        check(run(x, spec, transform, smooth, planes), expected(x, spec, transform, smooth))


@pytest.mark.parametrize(("sizes", "slices"), [((48, 64), 4), ((96, 128), 1)])
def test_the_largest_slices(sizes, slices):
    spec = layer_of(sizes, slices)
    x, smooth = tokens(4, spec.in_features, BF16)
    transform = factors_of(spec)
    check(run(x, spec, transform, smooth), expected(x, spec, transform, smooth))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_every_width_of_codes(bits):
    spec = layer_of((24, 32), 4, ActivationSpec(bits, "token", clip=0.6))
    x, smooth = tokens(13, spec.in_features, BF16)
    transform = factors_of(spec)
    got = run(x, spec, transform, smooth, planes=1)
    check(got, expected(x, spec, transform, smooth), bits)
    assert bits > 2 or set(got[0].unique().tolist()) == ({-1, 1} if bits == 1 else {-1, 0, 1})


def test_signs_of_the_smallest_numbers():
    """Powers of two have an exponent that fp32 can hold; a token of zeros counts as positive."""
    spec = layer_of((16, 18), 4, ActivationSpec(1, "token"), smooth=False)
    x, transform = (inputs(7, spec.in_features) * 1e-38).bfloat16(), factors_of(spec)
    x[3] = 0
    (codes, scale), (want, want_scale) = run(x, spec, transform), expected(x, spec, transform)
    assert torch.equal(codes[3], torch.ones_like(codes[3]))
    assert float((codes != want).float().mean()) < 2e-3
    assert torch.equal(scale, want_scale)  # the least there is


def test_share_of_codes_that_differ():
    """The figures of the module's docstring; a bf16 result of torch's transform flips 0.3 %."""
    spec = layer_of((24, 32), 4)
    x, smooth = tokens(96, spec.in_features, BF16)
    transform = factors_of(spec)
    (codes, _), (want, _) = run(x, spec, transform, smooth), expected(x, spec, transform, smooth)
    assert 3e-4 < float((codes != want).float().mean()) < 9e-4


@pytest.mark.parametrize("per_slice", [False, True], ids=["shared", "per slice"])
@pytest.mark.parametrize("slices", [1, 3, 4])
def test_parts_and_slices_read_their_own_factors(slices, per_slice):
    for parts in (1, 3):
        spec = layer_of((16, 18), slices, parts=parts, per_slice=per_slice)
        x, smooth = tokens(5, spec.in_features, HALF)
        transform = torch.cat(
            [f + 0.3 * inputs(1, f.numel(), seed=i)[0] for i, f in enumerate(factors_of(spec).split(9))]
        )  # no two alike
        assert transform.numel() == spec.shapes()["transform"][0]
        for planes in (0, 2):
            check(run(x, spec, transform, smooth, planes), expected(x, spec, transform, smooth))


def test_factors_of_any_size_and_dtype():
    """Powers of two bring x / s and the factors into the range of fp16, whatever it was; fp16 alone would be
    0 or infinite."""
    spec = layer_of((16, 18), 2, smooth=False)
    x = inputs(5, spec.in_features)
    for size, gain in ((1e-20, 1e-6), (1e15, 1e5), (1e30, 1.0), (1e-30, 1e9)):
        transform = factors_of(spec, gain).bfloat16()
        check(run((x * size).bfloat16(), spec, transform), expected((x * size).bfloat16(), spec, transform))


def test_one_channel_far_above_the_others():
    spec = layer_of((24, 32), 4, smooth=False)
    x = inputs(6, spec.in_features, BF16)
    x[:, 100] = 3e4
    x[3] = 0
    x[4] = 6e-8
    transform = factors_of(spec)
    codes, scale = run(x, spec, transform)
    check((codes, scale), expected(x, spec, transform))
    assert not codes[3].any()
    assert float(scale[3]) == pytest.approx(TINY / 7)


def test_rows_of_a_wider_tensor():
    spec = layer_of((16, 16), 2)
    wide, smooth = tokens(5, 1280, HALF)
    x, transform, codes, scale = (
        wide[:, 512:1024],
        factors_of(spec),
        torch.zeros(5, 1024, dtype=torch.int8),
        torch.empty(1, 5),
    )
    launch.quantize_kronecker(
        x, codes[:, 256:], scale, smooth[512:1024], transform, None, None, 1, 2, 16, 16, False, 2, 4, False,
        1.0, *NOTHING[:1], 0.0
    )  # fmt: skip
    check(
        (torch.stack([codes[:, 256:512], codes[:, 768:]], 2).flatten(1).short(), scale.T),
        expected(x, spec, transform, smooth[512:1024]),
    )
    assert not codes[:, :256].any()
    assert not codes[:, 512:768].any()


def test_fused_gelu_and_layernorm():
    spec = layer_of((16, 18), 4)
    x, smooth = tokens(9, spec.in_features, BF16)
    modulation = LayerNormModulate(
        0.3 * inputs(3, spec.in_features, BF16, 11), 0.3 * inputs(3, spec.in_features, BF16, 12)
    )
    transform = factors_of(spec)
    for before, raised in ((Gelu(), x.clamp(-6, 6)), (modulation, x + 40)):
        got, want = (
            run(raised, spec, transform, smooth, prologue=before),
            expected(before(raised), spec, transform, smooth),
        )
        steps = (
            got[0] - want[0]
        ).abs()  # an input that rounds another way to bf16 moves a token's whole slice a little
        assert int(steps.max()) <= 1
        assert float((steps > 0).float().mean()) < 0.01
        assert float((got[1] / want[1] - 1).abs().max()) < 0.01


def test_nan_stays_in_its_token():
    spec = layer_of((24, 32), 4)
    x, smooth = tokens(5, spec.in_features, BF16)
    x[2, 700] = torch.nan
    codes, scale = run(x, spec, factors_of(spec), smooth)
    assert scale.isnan().flatten().tolist() == [False, False, True, False, False]
    x[2, 700] = 0
    whole = torch.arange(5) != 2
    assert torch.equal(codes[whole], run(x, spec, factors_of(spec), smooth)[0][whole])


def test_no_token_is_no_launch():
    spec = layer_of((16, 16), 1)
    codes, scale = run(inputs(0, 256, HALF), spec, factors_of(spec), inputs(1, 256)[0])
    assert (codes.shape, scale.shape) == ((0, 256), (0, 1))
