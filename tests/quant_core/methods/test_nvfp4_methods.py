"""Methods that fit on the nvfp4 grid: better than int4 where codes have a sign, each step by itself too."""

import pytest
import torch

from comfyui_nibble.kernels.operator import nvfp4
from comfyui_nibble.kernels.operator.codes import NVFP4
from comfyui_nibble.kernels.operator.quantizers import dequantize
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.methods import by_name, fit_problem, gptq
from comfyui_nibble.tests.support import sqnr_db

HALVES = (Part(0, 128), Part(128, 640, after_gelu=True))


def fitted(make_problem, name, parts=None, width=512, **options):
    """(dB on held-out tokens, the Fitted)."""
    problem, method = make_problem(192, width, parts), by_name(name)
    done = fit_problem(problem, method, method.configured(**options))
    return output_sqnr(problem, done.layer), done


@pytest.mark.parametrize("name", ["svdquant", "svdquant_r", "convrot", "rtn"])
def test_better_than_int4_under_outliers(make_problem, name):
    (four, _), (db, done) = (fitted(make_problem, name, grid=grid) for grid in ("int", "nvfp4"))
    assert done.layer.spec.grid == NVFP4
    assert done.layer.spec.describe().startswith("W4A4 nvfp4")
    assert db > four + 1


def test_each_step_earns_its_place(make_problem):
    full, done = fitted(make_problem, "svdquant", grid="nvfp4")
    assert done.choices["rounding"] == "gptq"
    assert full > fitted(make_problem, "svdquant", grid="nvfp4", gptq=False)[0] + 0.1
    assert full > fitted(make_problem, "svdquant", grid="nvfp4", rank=0)[0] + 0.5
    assert full > fitted(make_problem, "rtn", grid="nvfp4")[0] + 3


def test_two_halves_and_principal_components(make_problem):
    db, done = fitted(make_problem, "svdquant_p", HALVES, 640, grid="nvfp4")
    first, second = done.layer.spec.parts
    assert db > 18
    assert not second.activation.shift
    assert done.layer.tensors["outer_scale"].shape == (2, 192)
    assert first.activation.either
    assert second.weight == first.weight


def test_gptq_on_the_grid():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 128, generator=g) @ torch.randn(128, 128, generator=g)
    weight, held = torch.randn(40, 128, generator=g), torch.randn(512, 128, generator=g)
    factor = {(0, 128): gptq.upper_factor(x.T @ x / len(x), 0.01)}
    codes, scales = gptq.quantize(weight.T.contiguous(), factor, 4, 16, torch.bfloat16, grid=NVFP4)
    assert scales.shape == (8, 40)
    assert torch.equal(nvfp4.stored(scales.T), scales.T)
    assert set(codes.abs().unique().tolist()) <= set(nvfp4.DOUBLED)
    scale = nvfp4.stored(nvfp4.four_over_six(weight))
    nearest = dequantize(nvfp4.quantize(weight, scale), scale, "group", 16)
    rounded = dequantize(codes.T, scales.T, "group", 16)
    tokens = held @ torch.linalg.cholesky(x.T @ x / len(x)).T
    want = tokens @ weight.T
    assert sqnr_db(want, tokens @ rounded.T) > sqnr_db(want, tokens @ nearest.T) + 2


def test_a_layer_of_zeros_and_one_without_data(make_problem):
    method = by_name("svdquant")
    problem = make_problem(64, 128, calibrated=False)
    problem.weight[5] = 0
    done = fit_problem(problem, method, method.configured(grid="nvfp4")).layer
    assert not done.dequantize()[5].any()
    assert sqnr_db(problem.weight, done.dequantize()) > 15
    problem.weight.zero_()
    done = fit_problem(problem, method, method.configured(grid="nvfp4")).layer
    assert not done.dequantize().any()


@pytest.mark.quick
def test_grids_that_nobody_has_are_named():
    with pytest.raises(ValueError, match="unknown grid 'fp4': expected int or nvfp4"):
        by_name("svdquant").configured(grid="fp4")
    with pytest.raises(ValueError, match="method robuq has no option grid; svdquant_r, svdquant_p, "):
        by_name("robuq").configured(grid="nvfp4")
