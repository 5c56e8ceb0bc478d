"""Which grid a layer takes where nvfp4 is asked for."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.operator.codes import INT, NVFP4
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.methods import by_name, grids
from comfyui_nibble.quant_core.methods.svdquant import SVDQuantConfig, fit

CONFIG = SVDQuantConfig(rank=16, rotation=64, grid=NVFP4)
NEVER, ALWAYS = 100.0, -100.0  # dB


def same(found, want) -> bool:
    return found.spec == want.spec and all(torch.equal(t, want.tensors[k]) for k, t in found.tensors.items())


def with_tokens(problem, make):
    """The problem with make(tokens) in place of its tokens and of all that was learned of its fit tokens."""
    stats, g = problem.statistics, torch.Generator().manual_seed(1)
    x = make(torch.rand(4096, stats.width, generator=g) * 2 - 1)
    of_x = {b: x[:, slice(*b)].T @ x[:, slice(*b)] for b in stats.hessians}
    held = make(torch.rand(len(stats.tokens), stats.width, generator=g) * 2 - 1)
    return replace(
        problem,
        statistics=replace(
            stats, absmax=x.abs().amax(0), count=len(x), hessians=of_x, tokens=held.to(stats.tokens.dtype)
        ),
    )


@pytest.fixture
def problem(make_problem):
    return lambda: make_problem(128, 128)


def test_a_layer_whose_input_nvfp4_rounds_better_is_fitted_once(problem):
    asked = []
    made = grids.closer(problem(), lambda p, config: asked.append(config.grid) or fit(p, config), CONFIG)
    assert asked == [NVFP4]
    assert same(made.layer, fit(problem(), replace(CONFIG, mixed=False)).layer)


@pytest.mark.parametrize(
    ("make", "after_gelu", "ahead"),
    [
        (lambda u: torch.erfinv(u.clamp(-0.999, 0.999)), False, 1.8),
        (lambda u: u, False, -1.8),
        (lambda u: u + 0.83, True, -7.4),
    ],
    ids=["Gaussian", "even", "even behind a GELU"],
)
def test_by_how_much_nvfp4_rounds_an_input_better(make_problem, make, after_gelu, ahead):
    """Behind a GELU whole numbers have no sign."""
    plain = make_problem(128, 256)
    parts = tuple(replace(part, after_gelu=after_gelu) for part in plain.layer.parts)
    problem = with_tokens(replace(plain, layer=replace(plain.layer, parts=parts)), make)
    config = replace(CONFIG, rotation=0, smooth=((0.0, 0.0),), mixed=False)
    assert grids._ahead(problem, fit(problem, config)) == pytest.approx(ahead, abs=0.3)


def test_a_text_of_few_words_takes_whole_numbers(make_problem):
    """GPTQ finds a weight without much error for 16 different rows, so that the rounding of x decides: 34.7
    dB on nvfp4 and 36.7 on int."""
    words = torch.rand(16, 256, generator=torch.Generator().manual_seed(2)) * 2 - 1
    problem = with_tokens(make_problem(128, 256), lambda u: words[(u[:, 0] * 8 + 8).long().clamp(max=15)])
    made = fit(problem, replace(CONFIG, rotation=0, rank=32))
    assert made.layer.spec.grid == INT
    assert made.choices["grid"] == INT


def test_whole_numbers_are_fitted_as_if_nothing_had_been_before(problem, monkeypatch):
    """The first fit uses its second moments up."""
    monkeypatch.setattr(grids, "AHEAD", NEVER)
    monkeypatch.setattr(grids, "WORTH", ALWAYS)
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
    monkeypatch.setattr(grids, "AHEAD", NEVER)
    monkeypatch.setattr(grids, "WORTH", decibels[1] - decibels[0] + step)
    assert fit(problem(), CONFIG).layer.spec.grid == (NVFP4 if step > 0 else INT)


@pytest.mark.parametrize("changed", [{"mixed": False}, {"grid": INT}])
def test_nothing_to_choose(problem, monkeypatch, changed):
    monkeypatch.setattr(grids, "AHEAD", NEVER)
    monkeypatch.setattr(grids, "WORTH", ALWAYS)
    assert fit(problem(), replace(CONFIG, **changed)).layer.spec.grid == (changed.get("grid") or NVFP4)


def test_without_calibration_all_is_nvfp4(make_problem):
    method = by_name("svdquant")
    problem = make_problem(128, 128, calibrated=False)
    assert method.fit(problem, method.configured(grid=NVFP4)).layer.spec.grid == NVFP4
