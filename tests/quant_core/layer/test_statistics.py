import pytest
import torch

from comfyui_nibble.quant_core.layer.statistics import (
    InputStatistics,
    NonFiniteActivation,
    hessian_blocks,
    peaks_of,
    reservoir_keys,
)


def check(statistics, x, sample, step):
    """What the calibration does of each call, its numbers read at the end of the step."""
    x = x.reshape(-1, statistics.width)
    peaks = peaks_of(x)
    statistics.require_finite(float(peaks.amax()), peaks, statistics.count + len(x), sample, step)


def make(width=128, reservoir=32):
    return InputStatistics.empty("layer", width, ((0, width),), reservoir)


def test_streamed_moments_equal_the_whole():
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    s = make()
    for piece in x.split(70):
        s.update(piece.reshape(1, -1, 128))
    assert s.count == 300
    assert torch.equal(s.absmax, x.abs().amax(0))
    assert torch.allclose(s.hessians[0, 128], x.T @ x, rtol=1e-5, atol=1e-4)


def test_reservoir_does_not_depend_on_order():
    x = torch.randn(200, 128).bfloat16()
    keys = reservoir_keys(0, "layer", 3, 1, 1, 200)
    whole, pieces = make(), make()
    whole.hold_out(x, keys, 0.5)
    for rows in torch.arange(200).flip(0).split(33):
        pieces.hold_out(x[rows], keys[rows], 0.5)
    assert torch.equal(whole.keys, pieces.keys)
    assert torch.equal(whole.tokens, pieces.tokens)
    assert torch.equal(whole.keys, keys.sort().values[:32])


def test_keys_depend_on_the_place_alone():
    a = reservoir_keys(0, "layer", 3, 1, 1, 5)
    assert torch.equal(a, reservoir_keys(0, "layer", 3, 1, 1, 5))
    for other in (
        (1, "layer", 3, 1, 1),
        (0, "other", 3, 1, 1),
        (0, "layer", 4, 1, 1),
        (0, "layer", 3, 2, 1),
        (0, "layer", 3, 1, 2),
    ):
        assert not torch.equal(a, reservoir_keys(*other, 5))


def test_merge_equals_one_run():
    x, y = torch.randn(100, 128), torch.randn(80, 128)
    both, a, b = make(), make(), make()
    for s, data, sample in ((a, x, 0), (b, y, 1), (both, x, 0), (both, y, 1)):
        s.update(data)
        s.hold_out(data, reservoir_keys(0, "layer", sample, 0, 1, len(data)), sample)
    a.merge(b)
    assert a.count == both.count == 180
    assert torch.equal(a.absmax, both.absmax)
    assert torch.equal(a.tokens, both.tokens)
    assert torch.equal(a.timesteps, both.timesteps)
    assert torch.allclose(a.hessians[0, 128], both.hessians[0, 128], rtol=1e-6, atol=1e-4)


def test_merge_of_other_widths_is_refused():
    with pytest.raises(ValueError, match="128 and 64 channels"):
        make().merge(make(64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activation_is_named(value):
    x = torch.zeros(2, 3, 128)
    x[1, 1, 77] = value
    with pytest.raises(NonFiniteActivation, match="layer layer, channel 77, sample 4, step 9"):
        check(make(), x, 4, 9)


def test_hessian_blocks_keep_parts_and_groups_whole():
    assert hessian_blocks([(0, 3072)], 3072) == ((0, 3072),)
    assert hessian_blocks([(0, 3072), (3072, 15360)], 3072) == (
        (0, 3072),
        (3072, 6144),
        (6144, 9216),
        (9216, 12288),
        (12288, 15360),
    )
    assert hessian_blocks([(0, 4608)], 3072) == ((0, 2304), (2304, 4608))
    for start, stop in hessian_blocks([(0, 64 * 7)], 128):
        assert start % 64 == stop % 64 == 0
    assert hessian_blocks([(0, 2520)], 3072) == ((0, 2520),)  # the last group may be short
    assert hessian_blocks([(0, 8960)], 3072) == ((0, 2240), (2240, 4480), (4480, 6720), (6720, 8960))
    assert hessian_blocks([(0, 3392)], 3072) == ((0, 1664), (1664, 3392))  # 53 groups: no even cut
    assert hessian_blocks([(0, 3360)], 3072) == ((0, 1664), (1664, 3360))


def test_padded_statistics_are_those_of_padded_tokens():
    x, zeros = torch.randn(50, 100), (0, 28)
    whole, short = (
        InputStatistics.empty("layer", 128, ((0, 64), (64, 128))),
        InputStatistics.empty("layer", 100, ((0, 64), (64, 100))),
    )
    for s, tokens in ((whole, torch.nn.functional.pad(x, zeros)), (short, x)):
        s.update(tokens)
        s.hold_out(tokens[:20], torch.arange(20, dtype=torch.float64), 0.5)
    short = short.padded(28)
    assert (short.width, short.blocks, short.count) == (whole.width, whole.blocks, whole.count)
    for leaf in ("absmax", "tokens", "keys", "timesteps"):
        assert torch.equal(getattr(short, leaf), getattr(whole, leaf))
    assert all(torch.allclose(short.hessians[b], h, rtol=1e-5) for b, h in whole.hessians.items())


def test_memory_bound_is_what_is_held():
    s = make(width=256, reservoir=64)
    s.update(torch.randn(10, 256))
    s.hold_out(torch.randn(100, 256), torch.rand(100, dtype=torch.float64), 0.0)
    held = sum(h.nbytes for h in s.hessians.values()) + s.tokens.nbytes + s.absmax.nbytes
    assert held == InputStatistics.nbytes(256, ((0, 256),), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_whose_squares_overflow_name_their_place(dtype):
    x = torch.ones(8, 128, dtype=dtype)
    x[3, 77] = -1e30
    with pytest.raises(
        NonFiniteActivation,
        match=r"^Values up to 1e\+30 at the input of layer layer, channel 77, sample 4, step 9. Their "
        r"squares, summed over 8 ",
    ):
        check(make(), x, 4, 9)
    check(InputStatistics.empty("layer", 128, ()), x, 4, 9)  # no second moments to overflow


def test_the_bound_on_second_moments_counts_the_tokens_so_far():
    s, x = make(), torch.full((4, 128), 1e18)
    for step in range(85):  # 340 tokens: 3.4e38
        check(s, x, 0, step)
        s.update(x)
    assert torch.isfinite(s.hessians[0, 128]).all()
    with pytest.raises(
        NonFiniteActivation, match="sample 0, step 85. Their squares, summed over 344 tokens, overflow fp32"
    ):
        check(s, x, 0, 85)


def test_a_call_without_tokens_changes_nothing():
    s, x = make(), torch.randn(5, 128)
    s.update(x)
    s.hold_out(x, reservoir_keys(0, "layer", 3, 0, 1, 5), 0.5)
    count, absmax, hessian, tokens = s.count, s.absmax.clone(), s.hessians[0, 128].clone(), s.tokens.clone()
    for empty in (torch.empty(0, 128), torch.empty(1, 0, 128)):
        s.update(empty)
        s.hold_out(empty, reservoir_keys(0, "layer", 3, 1, 1, 0), 0.5)
    assert s.count == count
    assert torch.equal(s.absmax, absmax)
    assert torch.equal(s.hessians[0, 128], hessian)
    assert torch.equal(s.tokens, tokens)
