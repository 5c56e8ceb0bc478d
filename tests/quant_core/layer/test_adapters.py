"""What stands beside a packed layer, against the dense matrices it stands for."""

import pytest
import torch

from comfyui_nibble.kernels.dispatch import quant_linear
from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer.adapters import (
    Kronecker,
    LowRank,
    Side,
    bias_correction,
    hadamard_low_rank,
    kronecker_or_low_rank,
)
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.tests.support import relative_error

pytestmark = pytest.mark.quick

N, K = 96, 128


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


PLAIN = (Part(0, K),)
GELU_HALVES = (Part(0, 64), Part(64, K, after_gelu=True))


def quantized(parts=PLAIN, method="svdquant", **options):
    layer = Layer("layer", "block", K, N, parts, "layer")
    chosen = by_name(method)
    return chosen.fit(
        Problem(layer, randn(N, K), randn(N, seed=1), None), chosen.configured(rank=8, **options)
    ).layer


def test_kronecker_product_is_applied_without_its_matrix():
    term, x = Kronecker(randn(4, 8), randn(24, 16)), randn(3, 5, K)
    torch.testing.assert_close(term(x), x @ torch.kron(term.left, term.right).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("a", "b"), [(4, 8), (8, 4), (6, 6)])
def test_decomposed_kronecker_product_is_low_rank(a, b):
    left, outer, inner = randn(a, b), randn(24, 2), randn(2, 16)
    term = kronecker_or_low_rank(left, outer @ inner, (outer, inner), first=3)
    assert isinstance(term, LowRank)
    assert term.down.shape == (2 * min(a, b), b * 16)
    assert term.first == 3
    torch.testing.assert_close(term.up @ term.down, torch.kron(left, outer @ inner), rtol=1e-5, atol=1e-4)


def test_full_kronecker_product_stays_one():
    """8 x 8 and 96 x 32: 8 * 96 * 32 + 768 * 8 multiplications a token, 196608 as a matrix."""
    assert isinstance(kronecker_or_low_rank(randn(8, 8), randn(96, 32), None), Kronecker)
    # Of rank 24 the low-rank form would take 24 * 8 * (768 + 256) = 196608 of them, the product 30720.
    assert isinstance(
        kronecker_or_low_rank(randn(8, 8), randn(96, 32), (randn(96, 24), randn(24, 32))), Kronecker
    )


def test_product_of_low_ranks_element_by_element():
    a, b = (randn(N, 3), randn(3, K)), (randn(N, 4, seed=5), randn(4, K, seed=5))
    up, down = hadamard_low_rank(a, b)
    assert up.shape == (N, 12)
    torch.testing.assert_close(up @ down, (a[0] @ a[1]) * (b[0] @ b[1]), rtol=1e-4, atol=1e-4)


def test_scaling_rows_scales_all_that_is_there():
    side, base = Side(N, K), randn(N, K)
    side.low_rank.append(LowRank(randn(4, K), randn(32, 4), 16))
    side.kronecker.append(Kronecker(randn(4, 8), randn(12, 16), 48))
    side.add_dense(randn(8, 32, seed=3), 2, 64)
    before = side.weight(base)
    factor = randn(40).abs()
    side.scale_rows(factor, 30)
    want = before.clone()
    want[30:70] *= factor[:, None]
    torch.testing.assert_close(side.weight(base), want, rtol=1e-5, atol=1e-4)
    assert side.kronecker == []  # rows 48 to 70 of 96 were scaled


@pytest.mark.parametrize("parts", [PLAIN, (Part(0, K, after_gelu=True),), GELU_HALVES])
def test_gain_scales_the_output_but_not_the_models_bias(parts):
    """Activations after GELU are shifted and the stored bias takes the shift back: that share of it scales
    with the weight."""
    layer, side = quantized(parts), Side(N, K)
    side.scale_rows(randn(N).abs() + 0.5)
    spec, changed = side.merged(layer, torch.float32)
    shifted = any(p.after_gelu for p in parts)
    assert ("bias_offset" in changed) == shifted
    correction = bias_correction(layer)
    assert (correction is not None) == shifted
    bias = layer.tensors["bias"].float() + (correction if shifted else 0)
    assert relative_error(randn(N, seed=1), bias) < 1e-6
    tensors = layer.tensors | changed
    tensors["bias"] = tensors["bias"].float() + tensors.pop("bias_offset", 0)
    x = torch.nn.functional.gelu(randn(20, K))
    got, plain = (naive.quant_linear(x, s, t) for s, t in ((spec, tensors), (layer.spec, layer.tensors)))
    assert relative_error((plain - bias) * side.gain + bias, got) < 2e-6
    assert relative_error(got, quant_linear(x, spec, tensors)) < 2e-6
    assert torch.equal(tensors["weight"], layer.tensors["weight"])


@pytest.mark.parametrize("parts", [PLAIN, GELU_HALVES])
def test_low_rank_joins_the_layers_own(parts):
    layer, side = quantized(parts), Side(N, K)
    side.low_rank += [LowRank(randn(4, K), randn(N, 4)), LowRank(randn(2, K, seed=1), randn(32, 2), 64)]
    spec, changed = side.merged(layer, torch.float32)
    assert spec.rank == 14
    assert set(changed) == {"proj_down", "proj_up"}
    x = randn(9, K)
    want = naive.quant_linear(x, layer.spec, layer.tensors) + x @ side.weight(torch.zeros(N, K)).T
    assert relative_error(want, naive.quant_linear(x, spec, layer.tensors | changed)) < 2e-6


@pytest.mark.parametrize(
    ("first", "rows", "kept"), [(0, N, 1), (32, 32, 1), (64, 32, 1), (0, 48, 0), (40, 8, 0)]
)
def test_one_number_leaves_kronecker_products_in_its_rows_and_out_of_them(first, rows, kept):
    """A matrix of the layer's size takes the place of a product only where a part of its rows is scaled."""
    side, base = Side(N, K), randn(N, K)
    side.kronecker.append(Kronecker(randn(4, 8), randn(8, 16), 32))
    side.low_rank.append(LowRank(randn(4, K), randn(N, 4)))
    want = side.weight(base)
    want[first : first + rows] *= -0.3
    side.scale(-0.3, rows, first, "cpu")
    torch.testing.assert_close(side.weight(base), want, rtol=1e-5, atol=1e-5)
    assert len(side.kronecker) == kept
    assert (side.dense is None) == bool(kept)


def test_bytes_and_words():
    layer, side = quantized(), Side(N, K)
    side.low_rank.append(LowRank(randn(4, K), randn(N, 4)))
    assert side.nbytes(layer, torch.bfloat16) == 4 * (N + K) * 2
    assert side.describe() == "rank 4"
    side.add_dense(randn(N, K))
    side.kronecker.append(Kronecker(randn(4, 8), randn(24, 16)))
    assert side.nbytes(layer, torch.bfloat16) == 2 * (4 * (N + K) + N * K + 32 + 384)
    side.scale_rows(torch.ones(N))
    assert (
        side.nbytes(layer, torch.float32)
        == 4 * (12 * (N + K) + N * K) - 2 * 8 * (N + K) + 2 * layer.tensors["weight_scale"].numel()
    )
    assert side.describe() == "gain, rank 4, dense 96 x 128"
