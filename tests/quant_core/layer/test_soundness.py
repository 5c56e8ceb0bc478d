"""Weights, statistics and tokens that nothing can be fitted to: an error that names the layer, from every
place that fits one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.kernels.operator.errors import naming as of_file
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer import lowrank
from comfyui_nibble.quant_core.layer.adapters import LowRank, Side
from comfyui_nibble.quant_core.layer.bake import bake
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.problem import Fitted, output_sqnr
from comfyui_nibble.quant_core.layer.soundness import (
    NonFiniteWeight,
    UnfitLayer,
    largest,
    naming,
    require_sound,
)
from comfyui_nibble.quant_core.methods import METHODS, fit_problem
from comfyui_nibble.quant_core.precision.menu import MIXED, MixedConfig, variants
from comfyui_nibble.quant_core.run.layers import problem_of, quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors

NAME = "blocks.0.linear"


class Held:
    """A calibration of one input."""

    def __init__(self, statistics):
        self.path, self.statistics, self.names = "c", statistics, [statistics.name]

    def get(self, name, second_moments=True):
        return self.statistics


def problem_with(problem, weight=None, bias=None):
    """`problem_of` on the tensors and the statistics of a Problem."""
    tensors = {
        f"{NAME}.weight": problem.weight if weight is None else weight,
        f"{NAME}.bias": problem.bias if bias is None else bias,
    }
    return problem_of(problem.layer, Tensors(tensors), Held(problem.statistics), "cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_whose_sums_overflow(make_problem, method, calibrated):
    problem = make_problem(64, 128, calibrated=calibrated)
    weight = problem.weight.float()
    weight[5, 7] = -3e38
    get = {f"{NAME}.weight": weight, f"{NAME}.bias": problem.bias}
    chosen, held = METHODS[method], Held(problem.statistics) if calibrated else None
    with pytest.raises(
        UnfitLayer,
        match=r"^layer blocks.0.linear: its weight goes up to 3e\+38, and from 1.44e\+17 on sums over 64 x "
        r"128 weights overflow",
    ):
        list(quantize_layers([problem.layer], Tensors(get), chosen, chosen.config, held))


@pytest.mark.parametrize("method", METHODS)
def test_weights_just_below_the_limit_are_fitted(make_problem, method):
    problem = make_problem(64, 128)
    problem.weight[5, 7] = 1.4e17
    require_sound(problem)
    chosen = METHODS[method]
    assert 0 < output_sqnr(problem, fit_problem(problem, chosen, chosen.config).layer) < float("inf")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_values_that_are_not_finite_name_the_leaf(make_problem, leaf, value):
    problem = make_problem(64, 128)
    damaged = getattr(problem, leaf).clone()
    damaged.view(-1)[3] = value
    with pytest.raises(NonFiniteWeight, match=f"^layer blocks.0.linear: NaN or Inf in its {leaf}"):
        problem_with(problem, **{leaf: damaged})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("field", "message"), [("absmax", "1 of the largest values"), ("hessians", "1 of the second moments"), ("tokens", "1 of the held-out tokens")]
)  # fmt: skip
def test_statistics_that_are_not_finite_name_calibration_and_input(make_problem, field, message, value):
    problem = make_problem(64, 128)
    found = getattr(problem.statistics, field)
    (found[0, 128] if field == "hessians" else found).view(-1)[9] = value
    with pytest.raises(
        UnfitLayer,
        match=f"^layer blocks.0.linear: calibration c has NaN or Inf in {message} of its input "
        "blocks.0.linear",
    ):
        problem_with(problem)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("rtn", "convrot")])
def test_a_failed_factorisation_names_the_layer(make_problem, method, monkeypatch):
    """Whatever is left: second moments that no damping makes positive definite."""
    problem = make_problem(64, 128)
    problem.statistics.hessians[0, 128] = -torch.ones(128, 128) + 1.5 * torch.eye(128)
    chosen = METHODS[method]
    with pytest.raises(
        UnfitLayer,
        match=r"^layer blocks.0.linear: cannot be fitted, .*; its weight goes up to [\d.e-]+; its input up "
        r"to ",
    ):
        fit_problem(problem, chosen, chosen.config)


def test_a_menu_names_the_layer(make_problem):
    def damaged():
        problem = make_problem(64, 128)
        problem.statistics.hessians[0, 128] = -torch.ones(128, 128) + 1.5 * torch.eye(128)
        return problem

    with pytest.raises(UnfitLayer, match=r"^layer blocks.0.linear: cannot be fitted"):
        list(variants(damaged, MixedConfig()))
    with pytest.raises(UnfitLayer, match=r"^layer blocks.0.linear: cannot be fitted"):
        MIXED.fit(damaged(), MixedConfig(layers={NAME: "robuq A4"}))


def test_what_was_fitted_is_finite(make_problem):
    """fp16 cannot hold the scales of these weights."""
    problem = make_problem(64, 128, calibrated=False)
    problem = replace(problem, weight=problem.weight.float() * 1e7)
    fitted = (
        METHODS["rtn"].fit(replace(problem, weight=problem.weight.bfloat16()), METHODS["rtn"].config).layer
    )
    narrow = fitted.tensors | {"weight_scale": fitted.tensors["weight_scale"].half()}
    method = replace(
        METHODS["rtn"], fit=lambda p, c: Fitted(QuantizedLayer(fitted.name, fitted.spec, narrow))
    )
    with pytest.raises(
        UnfitLayer,
        match=r"^layer blocks.0.linear: NaN or Inf in the weight_scale that was fitted to it, in float16",
    ):
        fit_problem(problem, method, method.config)


def test_a_report_has_no_quality_of_nan(make_problem):
    problem = make_problem(64, 128)
    layer = METHODS["rtn"].fit(problem, METHODS["rtn"].config).layer
    broken = QuantizedLayer(
        layer.name, layer.spec, layer.tensors | {"bias": torch.full_like(layer.tensors["bias"], float("nan"))}
    )
    with pytest.raises(
        UnfitLayer, match=r"^layer blocks.0.linear: its quantized output on 512 held-out tokens is not finite"
    ):
        output_sqnr(problem, broken)
    assert output_sqnr(problem, broken, "select") == -float("inf")
    problem.statistics.tokens[1, 0] = float("nan")
    with pytest.raises(
        UnfitLayer,
        match=r"^layer blocks.0.linear: its full-precision output on 512 held-out tokens is not finite",
    ):
        output_sqnr(problem, layer)


def test_an_adapter_that_overflows_names_the_layer(make_problem):
    layer = METHODS["rtn"].fit(make_problem(64, 128), METHODS["rtn"].config).layer
    down, up = torch.ones(4, 128), torch.full((64, 4), 3e38)
    with pytest.raises(UnfitLayer, match=r"^layer blocks.0.linear: NaN or Inf in the proj_up"):
        bake(layer, Side(64, 128, low_rank=[LowRank(down, up * 2)]))
    dense = torch.randn(64, 128)
    dense[3, 5] = float("inf")
    with pytest.raises(
        UnfitLayer, match=r"^layer blocks.0.linear: (cannot be fitted|NaN or Inf in the proj_)"
    ):
        bake(layer, Side(64, 128, dense=dense), rank=8)


@pytest.mark.parametrize("value", [3e38, float("nan")])
def test_the_file_is_named_too(tmp_path, tiny_state, value):
    state = {k: v.float() for k, v in tiny_state.items()}
    state["single_blocks.1.linear2.weight"][3, 5] = value
    save_file(state, tmp_path / "m.safetensors")
    chosen = METHODS["svdquant"]
    with pytest.raises(
        UnfitLayer,
        match=r"m.safetensors: layer single_blocks.1.linear2: (its weight goes up to 3e\+38|NaN or Inf in "
        r"its weight)",
    ):
        quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", chosen, chosen.config)
    assert not (tmp_path / "q.safetensors").exists()


def test_only_failures_of_linear_algebra_are_renamed():
    with pytest.raises(ZeroDivisionError), naming("a"):
        1 / 0  # noqa: B018
    with pytest.raises(UnfitLayer, match="^layer a: cannot be fitted, "), naming("a"):
        torch.linalg.cholesky(-torch.eye(2))
    with (
        pytest.raises(UnfitLayer, match=r"^m.safetensors: layer a: cannot be fitted, "),
        of_file(Path("m.safetensors")),
        naming("a"),
    ):
        lowrank.truncated(lambda rows: torch.full((4, 4), float("nan"))[rows], (4, 4), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_magnitude(dtype):
    assert largest(torch.tensor([[1.0, -3.0], [2.0, 0.0]], dtype=dtype)) == 3
    assert largest(torch.tensor([], dtype=dtype)) == 0
    assert not largest(torch.tensor([1.0, float("nan")], dtype=dtype)) < float("inf")
    assert largest(torch.tensor([1.0, -float("inf")], dtype=dtype)) == float("inf")


def test_the_checkpoint_itself_is_sound():
    assert all(largest(t) < 100 for t in tiny_flux.load().state_dict().values())


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int8, torch.bool], ids=str)
def test_integers_are_no_weights(leaf, dtype):
    """PyTorch has no minimum of uint16, and would take others as numbers."""
    state = {"a.weight": torch.randn(64, 64), "a.bias": torch.randn(64)}
    state[f"a.{leaf}"] = torch.zeros(state[f"a.{leaf}"].shape, dtype=dtype)
    with pytest.raises(UnfitLayer, match=rf"layer a: its {leaf} has the dtype {dtype}, expected floats"):
        problem_of(Layer("a", "b", 64, 64, (Part(0, 64),), "a"), Tensors(state), None, "cpu")
