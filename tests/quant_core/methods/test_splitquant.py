"""SplitQuant: slices, factors, the fold, and what each piece is worth on a layer with outliers."""

import dataclasses

import pytest
import torch

from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.methods.problem import output_sqnr
from comfyui_nibble.quant_core.methods.splitquant import (
    NoBalancedFactors,
    SplitQuantConfig,
    balanced,
    cayley,
    fake_quantize,
    fit,
    slice_width,
    start_factor,
)
from comfyui_nibble.quant_core.spec import LinearSpec, parse
from comfyui_nibble.quant_core.transforms import fold_weight, kronecker, transform_activation, unfold_weight
from comfyui_nibble.tests.support import relative_error


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_factors_of_the_widths_in_use():
    """Those of the paper's table for 3072, 1152 and 12288 channels."""
    widths = {3072: (48, 64), 768: (24, 32), 192: (12, 16), 1152: (32, 36), 288: (16, 18), 72: (8, 9), 12288: (96, 128)}
    assert {w: balanced(w) for w in widths} == widths
    with pytest.raises(NoBalancedFactors, match="61 channels a slice have no factors but 1; the nearest that do are 60 and 62"):
        balanced(61)
    with pytest.raises(NoBalancedFactors, match="5 slices do not divide 3072 channels; the nearest that do: 4 and 6"):
        slice_width(3072, 5)


@pytest.mark.parametrize("pairs", [1, 4])
def test_fold_is_the_inverse(pairs):
    """To fp64: (W T^-1)(T x) = W x, and unfolding gives W back, with affine factors of a shared pair and of one a slice."""
    factors = tuple(torch.linalg.qr(randn(pairs, n, n).double())[0] * (1 + randn(pairs, n, 1).double().abs()) for n in (6, 8))
    w, x, s = randn(10, 192).double(), randn(7, 192).double(), randn(192).double().abs() + 0.5
    folded = fold_weight(w, s, 0, factors)
    assert relative_error(x @ w.T, transform_activation(x, s, 0, factors=factors) @ folded.T) < 1e-13
    assert relative_error(w, unfold_weight(folded, s, 0, factors)) < 1e-13


def test_transform_is_the_kronecker_product_on_each_slice():
    p1, p2, x = randn(1, 4, 4), randn(1, 6, 6), randn(5, 72)
    want = torch.cat([piece @ torch.kron(p1[0], p2[0]) for piece in x.split(24, 1)], 1)
    torch.testing.assert_close(kronecker(x, p1, p2), want, rtol=1e-4, atol=1e-4)


def test_straight_through_gradients():
    """Inside the range the gradient of x is 1 and that of the scale is code - x / scale; outside 0 and the largest code."""
    x, scale = torch.tensor([[0.26, -0.9, 3.0]], requires_grad=True), torch.tensor([[0.1]], requires_grad=True)
    y = fake_quantize(x, scale)
    torch.testing.assert_close(y, torch.tensor([[0.3, -0.7, 0.7]]))
    grads = torch.autograd.grad(y, (x, scale), torch.tensor([[1.0, 10.0, 100.0]]))
    torch.testing.assert_close(grads[0], torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(grads[1], torch.tensor([[(3 - 2.6) + 10 * -7 + 100 * 7]]))


def test_cayley_is_orthogonal_and_starts_at_one():
    q = cayley(randn(2, 9, 9).double())
    torch.testing.assert_close(q @ q.mT, torch.eye(9).double().expand(2, 9, 9))
    torch.testing.assert_close(cayley(torch.zeros(4, 4)), torch.eye(4))
    for n in (16, 24):
        p = start_factor(n, 0)
        torch.testing.assert_close(p @ p.T, torch.eye(n), atol=1e-5, rtol=0)


def test_what_each_piece_is_worth(make_problem):
    """Each against the one before it, in dB of the output on tokens that no fit saw."""
    db = {}
    for name, change in {"rotated": {"gptq": False}, "gptq": {}, "clip": {"clip": True}}.items():
        problem = make_problem(256, 1024)
        db[name] = output_sqnr(problem, fit(problem, dataclasses.replace(SplitQuantConfig(), **change)).layer)
    # 16.7, 18.4 and 19.7 dB. Smoothing takes all outliers of this layer, so that the rotation itself is worth nothing here.
    assert db["gptq"] > db["rotated"] + 1
    assert db["clip"] > db["gptq"] + 0.8


@pytest.mark.parametrize("transform", ["orthogonal", "affine"])
def test_training_is_worth_it_on_the_layer(make_problem, transform):
    problem = make_problem(256, 512)
    config = SplitQuantConfig(transform=transform, gptq=False)
    before = fit(problem, config)
    after = fit(problem, dataclasses.replace(config, steps=60, rows=256))
    assert after.choices["transform"] == "trained"
    assert output_sqnr(problem, after.layer) > output_sqnr(problem, before.layer) + 0.3


def test_training_that_diverges_keeps_the_start(make_problem):
    problem = make_problem(128, 256)
    config = SplitQuantConfig(gptq=False)
    fitted = fit(problem, dataclasses.replace(config, steps=5, rate=1e30))
    assert fitted.choices["transform"] == "start"
    assert torch.equal(fitted.layer.tensors["weight"], fit(problem, config).layer.tensors["weight"])


@pytest.mark.parametrize("per_slice", [False, True])
def test_spec_of_a_layer(make_problem, per_slice):
    problem = make_problem(128, 1024 + 512, parts=(Part(0, 512), Part(512, 1536, after_gelu=True)))
    layer = fit(problem, SplitQuantConfig(per_slice=per_slice)).layer
    first, second = layer.spec.parts
    assert (first.kronecker, first.pairs) == ((16, 16), 2 if per_slice else 1)
    assert (second.kronecker, second.pairs) == ((16, 16), 4 if per_slice else 1)
    assert layer.tensors["transform"].shape == (512 * (6 if per_slice else 2),)
    assert layer.spec.describe() == "W4A4 per channel smooth 2 slices 16x16"
    assert LinearSpec.from_json(layer.spec.to_json()) == layer.spec == parse(layer.spec.text)
    assert output_sqnr(problem, layer) > 10


def test_data_free(make_problem):
    problem = make_problem(128, 256, calibrated=False)
    fitted = fit(problem, by_name("splitquant").config)
    assert fitted.choices == {"data": "none"}
    assert fitted.layer.spec.rank == 0
