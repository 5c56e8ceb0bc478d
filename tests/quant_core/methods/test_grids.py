"""Which grid a layer takes where nvfp4 is asked for."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.operator.codes import INT, NVFP4
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.methods import by_name, grids
from comfyui_nibble.quant_core.methods.svdquant import SVDQuantConfig, fit

CONFIG = SVDQuantConfig(rank=16, rotation=64, grid=NVFP4)


def same(found, want) -> bool:
    return found.spec == want.spec and all(torch.equal(t, want.tensors[k]) for k, t in found.tensors.items())


@pytest.fixture
def problem(make_problem):
    return lambda: make_problem(128, 128)


def test_a_layer_that_is_close_enough_is_fitted_once(problem, monkeypatch):
    monkeypatch.setattr(grids, "ENOUGH", 0.0)
    asked = []
    made = grids.closer(problem(), lambda p, config: asked.append(config.grid) or fit(p, config), CONFIG)
    assert asked == [NVFP4]
    assert same(made.layer, fit(problem(), replace(CONFIG, mixed=False)).layer)


def test_whole_numbers_are_fitted_as_if_nothing_had_been_before(problem, monkeypatch):
    """The first fit uses its second moments up."""
    monkeypatch.setattr(grids, "ENOUGH", 100.0)
    monkeypatch.setattr(grids, "WORTH", -100.0)
    made, alone = fit(problem(), CONFIG), fit(problem(), replace(CONFIG, grid=INT))
    assert made.layer.spec.grid == INT
    assert same(made.layer, alone.layer)
    assert made.choices == alone.choices | {"grid": INT}
    assert "gptq" in made.choices["rounding"]


@pytest.mark.parametrize("step", [0.1, -0.1])
def test_the_closer_one_is_kept_where_it_is_worth_it(problem, monkeypatch, step):
    layers = [fit(problem(), replace(CONFIG, grid=grid, mixed=False)).layer for grid in (NVFP4, INT)]
    decibels = [output_sqnr(problem(), layer, "select") for layer in layers]
    assert decibels[0] > decibels[1] + 1
    monkeypatch.setattr(grids, "ENOUGH", 100.0)
    monkeypatch.setattr(grids, "WORTH", decibels[1] - decibels[0] + step)
    assert fit(problem(), CONFIG).layer.spec.grid == (NVFP4 if step > 0 else INT)


@pytest.mark.parametrize("changed", [{"mixed": False}, {"grid": INT}])
def test_nothing_to_choose(problem, monkeypatch, changed):
    monkeypatch.setattr(grids, "ENOUGH", 100.0)
    monkeypatch.setattr(grids, "WORTH", -100.0)
    assert fit(problem(), replace(CONFIG, **changed)).layer.spec.grid == (changed.get("grid") or NVFP4)


def test_without_calibration_all_is_nvfp4(make_problem):
    method = by_name("svdquant")
    problem = make_problem(128, 128, calibrated=False)
    assert method.fit(problem, method.configured(grid=NVFP4)).layer.spec.grid == NVFP4
