"""A side written into its layer: the same weight without the side."""

import pytest
import torch

from comfyui_nibble.quant_core.layer.adapters import Kronecker, LowRank, Side
from comfyui_nibble.quant_core.layer.bake import RankNeeded, bake
from comfyui_nibble.tests.quant_core.layer.test_adapters import GELU_HALVES, K, N, quantized, randn
from comfyui_nibble.tests.support import relative_error


def lora(rank=4, scale=0.1):
    return LowRank(randn(rank, K) * scale, randn(N, rank))


def test_every_column_kept_loses_rounding_only():
    layer, side = quantized(GELU_HALVES), Side(N, K, low_rank=[lora()])
    done = bake(layer, side)
    assert done.layer.spec.rank == 12
    assert done.before == 8
    assert relative_error(side.weight(layer.dequantize()), done.layer.dequantize()) < 2e-3  # bf16 has 8 bits
    assert done.error < 4e-3
    assert torch.equal(done.layer.tensors["weight"], layer.tensors["weight"])
    assert done.layer.tensors["proj_up"].dtype == torch.bfloat16


def test_gain_goes_into_scales_branch_and_bias():
    layer, side = quantized(GELU_HALVES), Side(N, K)
    side.scale_rows(randn(N).abs() + 0.5)
    done = bake(layer, side)
    x = torch.nn.functional.gelu(randn(40, K))
    want = (layer(x) - randn(N, seed=1)) * side.gain + randn(N, seed=1)
    assert relative_error(want, done.layer(x)) < 5e-3
    assert done.layer.tensors["weight_scale"].dtype == layer.tensors["weight_scale"].dtype


@pytest.mark.parametrize("parts", [None, GELU_HALVES])
def test_truncation_is_the_best_fit_and_its_error_is_stated(parts):
    layer = quantized(*([parts] if parts else []))
    side = Side(N, K, low_rank=[lora(16)])
    done = bake(layer, side, rank=10)
    assert done.layer.spec.rank == 10
    delta = side.weight(torch.zeros(N, K))
    stated = float((done.layer.dequantize() - layer.dequantize() - delta).norm() / delta.norm())
    assert abs(done.error - stated) < 1e-4
    # Eckart-Young: no rank-10 branch in the place of the 24 columns is closer, part by part.
    up, down, lost = layer.tensors["proj_up"].float(), layer.tensors["proj_down"].float(), 0.0
    for i, p in enumerate(layer.spec.parts):
        branch = up[:, i * 8 : i * 8 + 8] @ down[p.start : p.stop].T + delta[:, p.start : p.stop]
        lost += torch.linalg.svdvals(branch)[10:].square().sum()
    assert abs(done.error / (lost.sqrt() / delta.norm()) - 1) < 0.02


def test_full_rank_needs_a_rank():
    layer, side = quantized(), Side(N, K, kronecker=[Kronecker(randn(4, 8) * 0.1, randn(24, 16))])
    side.add_dense(randn(N, K) * 0.01)
    with pytest.raises(
        RankNeeded,
        match=r"layer layer: the adapter is of full rank \(1 Kronecker, dense 96 x 128\).*Set rank",
    ):
        bake(layer, side)
    errors = [bake(layer, side, rank=r).error for r in (8, 32, 96)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02  # 0.0125: the layer's own branch, 10 times the side, is rounded to bf16 anew


def test_rank_below_the_limit_is_left_alone():
    layer, side = quantized(), Side(N, K, low_rank=[lora()])
    assert bake(layer, side, rank=64).layer.spec.rank == 12
