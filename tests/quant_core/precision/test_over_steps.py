"""Errors over the steps of a sampling."""

import pytest
import torch

from comfyui_nibble.quant_core.charts.sheet import drawn
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.precision.over_steps import MOST, by_timestep, chosen, section


def fitted(problem):
    return METHODS["rtn"].fit(problem, METHODS["rtn"].configured()).layer


def test_one_timestep_has_the_error_of_the_report(make_problem):
    problem = make_problem(96, 256)
    problem.statistics.timesteps = torch.full_like(problem.statistics.timesteps, 0.5)
    layer = fitted(problem)
    ((time, db),) = by_timestep(problem, layer)
    assert time == 0.5
    assert db == pytest.approx(output_sqnr(problem, layer), abs=1e-6)


def test_each_timestep_has_the_error_of_its_own_tokens(make_problem):
    problem = make_problem(96, 256)
    stats = problem.statistics
    stats.timesteps = (torch.arange(len(stats.tokens)) // 2 % 3).float()
    stats.timesteps[::2] = 99  # of the half that candidates are chosen by
    layer = fitted(problem)
    points = by_timestep(problem, layer)
    assert [time for time, _ in points] == [0, 1, 2]
    tokens, times = stats.tokens, stats.timesteps
    for time, db in points:
        stats.tokens = tokens[times == time].repeat_interleave(2, 0)
        assert db == pytest.approx(output_sqnr(problem, layer), abs=1e-6)
    assert len({round(db, 3) for _, db in points}) == 3


def test_many_timesteps_share_points(make_problem):
    problem = make_problem(96, 256)
    problem.statistics.timesteps = torch.arange(len(problem.statistics.tokens)).float()
    points = by_timestep(problem, fitted(problem))
    assert len(points) == MOST
    assert [time for time, _ in points] == sorted(time for time, _ in points)


def test_the_worst_layers_are_among_those_that_are_measured():
    layers = [Layer(f"b.{i}.x", f"b.{i}", 64, 64, (Part(0, 64),), f"b.{i}.x") for i in range(100)]
    rows = [Row(f"b.{i}.x", f"b.{i}", 64, 64, "W4A4", 20.0 + (i % 50), 2304) for i in range(100)]
    names = [layer.name for layer in chosen(layers, rows, 12, 3)]
    assert len(names) == 12
    assert {"b.0.x", "b.50.x", "b.1.x"} <= set(names)
    assert names == sorted(names, key=lambda name: int(name.split(".")[1]))
    assert int(names[-1].split(".")[1]) > 80  # from first to last
    assert chosen(layers[:4], rows) == layers[:4]


def test_the_curve_names_the_worst_layer():
    found = {
        "b.0.x": [(0.2, 20.0), (0.8, 22.0)],
        "b.1.x": [(0.2, 10.0), (0.8, 12.0)],
        "b.2.x": [(0.8, 30.0)],
    }
    rows = [Row(name, name[:3], 64, 64, "W4A4", 20.0, 2304) for name in found]
    pixels, notes = drawn([section(found, rows)])
    assert notes == []
    assert pixels.shape == (1, 474, 960, 3)
