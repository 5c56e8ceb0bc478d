"""The caller's thread in front of a step's launches: which layers are counted, and that none is launched."""

import pytest

from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.evaluation.bench import cpu, host_cost
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.tests.assets.synthetic import flux_shapes


def test_the_layers_are_those_of_flux():
    counted = {}
    for (_, n, k, _), count in host_cost.layers().items():
        counted[n, k] = counted.get((n, k), 0) + count
    real = {}
    for layer in FLUX.layers(flux_shapes(19, 38)):
        shape = layer.out_features // 3072, layer.in_features // 3072
        real[shape] = real.get(shape, 0) + 1
    assert counted == real
    assert sum(counted.values()) == 304


@pytest.mark.parametrize("arch", [75, 89, 90, 120])
def test_a_step_is_the_sum_of_its_layers(arch):
    """By a clock that goes on by a second for each question: 10 ms a call."""
    ticks = iter(range(10**6))
    found = host_cost.step(Target("cuda", arch, (3, 6)), clock=lambda: next(ticks))
    for label in ("plain", "LoRA"):
        assert found[label]["layers"] == 304
        assert set(found[label]["us"].values()) == {1e6 / host_cost.CALLS}
        assert found[label]["ms"] == pytest.approx(304 * 1e3 / host_cost.CALLS)
    assert found["target"] == f"sm_{arch}"


def test_wall_clock_is_a_median_and_ends():
    times = iter([0, 0.3, 1, 1.1, 2, 2.2, *range(100)])
    calls = []
    found = cpu.wall(lambda: calls.append(1), 0.6, lambda: next(times))
    assert (round(found["ms"]), round(found["min_ms"]), found["samples"]) == (200, 100, 3)
    assert len(calls) == 4
