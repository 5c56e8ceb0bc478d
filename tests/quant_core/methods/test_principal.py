"""svdquant_p: fits with principal components, and what becomes of such layers elsewhere."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.operator.spec import SpecError
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen
from comfyui_nibble.quant_core.formats.nunchaku import targets as nunchaku
from comfyui_nibble.quant_core.layer.adapters import LowRank, Side
from comfyui_nibble.quant_core.layer.bake import RankNeeded, bake
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.lowrank import projected, strongest
from comfyui_nibble.quant_core.layer.precisions import in_int8, w4a8, w8a8
from comfyui_nibble.quant_core.layer.problem import Problem, output_sqnr
from comfyui_nibble.quant_core.layer.stack import stack_columns, stack_rows
from comfyui_nibble.quant_core.layer.statistics import InputStatistics, hessian_blocks
from comfyui_nibble.quant_core.methods import METHODS, fit_problem
from comfyui_nibble.quant_core.training.student import Student
from comfyui_nibble.tests.support import relative_error

K, N, RANK = 256, 96, 16


def falling(count, seed, width=K):
    """Tokens (count, width) whose spectrum falls as 1 / i^0.7, as trained networks' do."""
    fixed, g = torch.Generator().manual_seed(2), torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=fixed))[0]
    spread = torch.arange(1, width + 1).float() ** -0.7
    channels = (0.6 * torch.randn(width, generator=fixed)).exp()
    return torch.randn(count, width, generator=g) * spread @ basis * width**0.5 * channels


def problem(tokens=falling, parts=((0, K),), name="layer"):
    g = torch.Generator().manual_seed(9)
    x, held = tokens(2048, 21), tokens(512, 22)
    weight = (
        torch.randn(N, K, generator=g) / K**0.5 / x.square().mean(0).sqrt().clamp(min=0.05).sqrt()
    ).bfloat16()
    stats = InputStatistics.empty(name, K, hessian_blocks(parts, 3072))
    stats.update(x)
    stats.hold_out(held, torch.rand(512, generator=g, dtype=torch.float64), 0.5)
    layer = Layer(name, "block", K, N, tuple(Part(*p) for p in parts), name)
    return Problem(layer, weight, torch.zeros(N).bfloat16(), stats)


def fitted(method, made, **options):
    chosen = METHODS[method]
    return fit_problem(made, chosen, chosen.configured(rank=RANK, **options))


@pytest.fixture(scope="module")
def layer():
    return fitted("svdquant_p", problem()).layer


@pytest.mark.quick
@pytest.mark.parametrize("parts", [((0, K),), ((0, 128), (128, K))])
def test_a_falling_spectrum_gains(parts):
    """3.5 and 3.4 dB, at the same bytes."""
    plain, better = (fitted(m, made := problem(parts=parts)) for m in ("svdquant_r", "svdquant_p"))
    gain = output_sqnr(made, better.layer) - output_sqnr(made, plain.layer)
    assert gain > 3
    assert all(p.principal in (RANK // 2, RANK) for p in better.layer.spec.parts)
    assert better.layer.nbytes == plain.layer.nbytes
    assert better.choices["principal" if len(parts) == 1 else "0.principal"] in (RANK // 2, RANK)


def test_what_has_no_strong_direction_takes_none():
    white = lambda count, seed: torch.randn(count, K, generator=torch.Generator().manual_seed(seed))
    made = fitted("svdquant_p", problem(white))
    assert made.layer.spec.parts[0].principal == 0
    assert "principal" not in made.choices


def test_shares_give_so_many_columns():
    for share in (0.25, 1.0):
        found = fitted("svdquant_p", problem(), principal=(share,)).layer.spec
        assert found.parts[0].principal == share * RANK


def test_a_layer_of_zeros_is_fitted():
    """Where no candidate has an error, none is nearer than another."""
    made = problem()
    made.weight.zero_()
    assert torch.equal(fitted("svdquant_p", made).layer(falling(8, 3)), torch.zeros(8, N))


def test_without_second_moments_there_are_none():
    made = problem()
    made.statistics.hessians.clear()
    assert fitted("svdquant_p", made).layer.spec.parts[0].principal == 0


def test_strongest_directions():
    x = falling(4096, 5)
    h = x.T @ x
    values, vectors = strongest(h, 8)
    want, exact = torch.linalg.eigh(h.double())
    assert torch.allclose(values.double(), want.flip(0)[:8], rtol=1e-4)
    assert relative_error(torch.eye(8), vectors.T @ vectors) < 1e-5
    # The span, whose vectors may turn where two values are close.
    share = (exact.flip(1)[:, :8].T @ vectors.double()).square().sum(0)
    assert share.min() > 0.99
    left = x - x @ vectors @ vectors.T
    assert relative_error(left.T @ left, projected(h, vectors)) < 1e-3


def test_strongest_directions_behind_a_smoothing():
    """Those of x / s, from the moments of x."""
    x, smooth = falling(4096, 5), torch.linspace(0.2, 3, K)
    values, vectors = strongest(x.T @ x, 8, smooth=smooth)
    z = x / smooth
    want_values, want = strongest(z.T @ z, 8)
    assert torch.allclose(values, want_values, rtol=1e-4)
    assert (want.T @ vectors).square().sum(0).min() > 0.9999


def test_smoothing_is_chosen_with_the_components():
    """24.9 dB; 24.3 with the smoothing that is best without them."""
    made = problem()
    plain, better = fitted("svdquant_r", made), fitted("svdquant_p", problem())
    assert plain.choices["smooth"] != better.choices["smooth"]
    assert output_sqnr(made, better.layer) > 24.7


def test_both_transforms_go_on_to_gptq():
    """svdquant_r is no worse than svdquant, whatever rounding to nearest said of its transforms."""
    for tokens in (falling, lambda n, s: falling(n, s) * torch.linspace(0.2, 3, K)):
        found = {
            m: output_sqnr(problem(tokens), fitted(m, problem(tokens)).layer)
            for m in ("svdquant", "svdquant_r")
        }
        assert found["svdquant_r"] > found["svdquant"] - 0.1


def test_formats_without_them_say_so(layer):
    assert kitchen.format_of(layer.spec) == ({}, "principal components, which its low rank takes out of x")


def test_nunchaku_says_so(layer):
    name = "double_blocks.0.img_attn.proj"
    plain = replace(layer.spec, parts=tuple(replace(p, rotation=0) for p in layer.spec.parts))
    assert "takes principal components out of its input" in nunchaku.losses({name: plain}, "flux")[name]


def test_baking_keeps_them(layer):
    g = torch.Generator().manual_seed(1)
    side = Side(
        N, K, low_rank=[LowRank(torch.randn(4, K, generator=g) / 16, torch.randn(N, 4, generator=g) / 8)]
    )
    count = layer.spec.parts[0].principal
    for rank in (0, count + 4):
        done = bake(layer, side, rank).layer
        assert done.spec.parts[0].principal == count
        for key in ("proj_down", "proj_up"):
            assert torch.equal(done.tensors[key][:, :count], layer.tensors[key][:, :count])
        x = falling(64, 3)
        want = layer(x) + x @ side.weight(torch.zeros(N, K)).T
        assert relative_error(want, done(x)) < 0.03
    with pytest.raises(RankNeeded, match=f"set rank to {count + 1} at least"):
        bake(layer, side, count)


def test_rows_stand_together_only_with_one_x(layer):
    with pytest.raises(SpecError, match="read x in different ways"):
        stack_rows("both", [layer, layer])
    halves = layer.split_rows(["a", "b"], [N // 2, N // 2])
    again = stack_rows("both", halves, share=True)
    assert again.spec.parts == layer.spec.parts
    assert torch.equal(again(falling(8, 3)), layer(falling(8, 3)))


def test_columns_keep_each_its_own(layer):
    other = fitted("svdquant_r", problem()).layer
    wide = stack_columns("wide", [layer, without_bias(other)])
    x, z = falling(16, 3), falling(16, 4)
    assert [p.principal for p in wide.spec.parts] == [layer.spec.parts[0].principal, 0]
    assert relative_error(layer(x) + other(z), wide(torch.cat([x, z], 1))) < 1e-4


def without_bias(layer):
    tensors = {k: t for k, t in layer.tensors.items() if k != "bias"}
    return QuantizedLayer(layer.name, replace(layer.spec, bias=False), tensors)


def test_raised_to_8_bit_and_in_int8(layer):
    x, made = falling(64, 3), problem()
    want = x @ made.weight.float().T
    assert w8a8(made, layer).spec.parts[0].principal == 0
    error = relative_error(want, layer(x))
    for raised in (in_int8(layer), w4a8(layer)):
        assert raised.spec.parts[0].principal == layer.spec.parts[0].principal
        assert relative_error(want, raised(x)) < error


def test_training_is_refused(layer):
    with pytest.raises(SpecError, match="principal components are not trained"):
        Student(problem(), layer, ("scales",))


def few(rows, size):
    """Tokens of a text: copies of so many rows, one of which has a direction `size` times as long as the
    others."""
    fixed = torch.Generator().manual_seed(4)
    there = torch.randn(rows, K, generator=fixed)
    there[0] += size * torch.randn(K, generator=fixed)
    return lambda count, seed: there[
        torch.randint(rows, (count,), generator=torch.Generator().manual_seed(seed))
    ]


@pytest.mark.parametrize(("rows", "size"), [(24, 60), (24, 600), (17, 60), (16, 60), (12, 600), (18, 3000)])
def test_tokens_with_few_different_rows(rows, size):
    """With most of what they are taken out, the rest of their moments is the noise of fp32, which no
    factorization takes as it is."""
    tokens = few(rows, size)
    made = fitted("svdquant_p", problem(tokens))
    components, plain = made.layer, fitted("svdquant_r", problem(tokens)).layer
    assert made.choices["principal"] in (RANK // 2, RANK)
    judged = problem(tokens)
    assert output_sqnr(judged, components) > output_sqnr(judged, plain) + 6
