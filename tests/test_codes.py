"""Two runs on equal codes: what differs by an order of sums passes, what differs for real does not."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.operator.packing import pack
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.tests.codes import (
    Codes,
    assert_apart_by_flips,
    assert_repeats,
    kept,
    layer_error,
    record,
    taken,
)
from comfyui_nibble.tests.support import relative_error

pytestmark = [pytest.mark.arithmetic, pytest.mark.quick]
TOKEN, CHANNEL = ActivationSpec(granularity="token"), WeightSpec(granularity="channel")


@pytest.fixture
def layer():
    g = torch.Generator().manual_seed(0)
    tensors = {
        "weight": pack(torch.randint(-7, 8, (64, 64), generator=g), 4),
        "weight_scale": torch.full((1, 64), 0.1),
    }
    return QuantizedLayer("", LinearSpec(64, 64, (PartSpec(0, 64, CHANNEL, TOKEN),), bias=False), tensors)


@pytest.fixture
def x():
    """Tokens of which the largest value is 7, so that a step is 1, and one value lies between the codes 2 and
    3."""
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-6, 7, (5, 64), generator=g) + 0.4 * (torch.rand(5, 64, generator=g) - 0.5)
    x[:, 0], x[3, 20] = 7, 2.5
    return x


def moved(x, by):
    return x.index_put((torch.tensor(3), torch.tensor(20)), torch.tensor(2.5 + by))


def test_a_code_on_the_edge_is_a_step_and_explained(layer, x):
    other = moved(x, 1e-6)
    assert relative_error(layer(x), layer(other)) > 0.005
    assert_repeats(record(layer, x), layer, other)
    with kept() as codes:
        layer(x)
    with taken(codes) as took:
        layer(other)
    assert (took.changed, len(codes)) == (1, 320)
    assert 0 < took.edge < 2e-6


@pytest.mark.parametrize("by", [0.001, -0.001])
def test_a_value_that_moved_for_real_is_found(layer, x, by):
    recorded = record(layer, moved(x, -by))
    with pytest.raises(AssertionError, match="a value lies 0.001 steps beyond"):
        assert_repeats(recorded, layer, moved(x, by))


def test_a_scale_of_another_token_is_found(layer, x):
    """One scale a token, as it is, against one for all: the defect that batches are tested for."""
    x[0, 0] = 14
    (part,) = layer.spec.parts
    shared = replace(layer.spec, parts=(replace(part, activation=ActivationSpec(granularity="tensor")),))
    with pytest.raises(AssertionError, match="a value lies"):
        assert_repeats(record(layer, x), QuantizedLayer("", shared, layer.tensors), x)


def test_an_output_that_differs_on_equal_codes_is_found(layer, x):
    scaled = QuantizedLayer(
        "", layer.spec, layer.tensors | {"weight_scale": layer.tensors["weight_scale"] * 1.001}
    )
    with pytest.raises(AssertionError, match="outputs on equal codes differ by 0.001"):
        assert_repeats(record(layer, x), scaled, x)


def test_calls_must_be_as_many(layer, x):
    with pytest.raises(AssertionError, match="called more often than the 1 times"):
        assert_repeats(record(layer, x), lambda: layer(layer(x)))
    with pytest.raises(AssertionError, match="1 calls of the quantizer, 2 in the run before"):
        assert_repeats(record(lambda: layer(layer(x))), layer, x)
    with (
        taken(Codes([torch.zeros(4, 64, dtype=torch.int8)])),
        pytest.raises(AssertionError, match=r"shape \(5, 64\), before \(4, 64\)"),
    ):
        layer(x)


def test_layer_error_leaves_out_what_an_edge_can_move(layer, x):
    other = layer(moved(x, 1e-6))
    assert layer_error(layer(x), other, x, layer.spec, layer.tensors) < 1e-6
    assert layer_error(layer(x), other * 1.001, x, layer.spec, layer.tensors) > 5e-4
    inside = moved(x, -0.2)
    assert layer_error(layer(inside), other, inside, layer.spec, layer.tensors) > 0.005


def test_two_programs_are_apart_by_their_errors():
    full, one, two = torch.eye(3)
    near, far = full + 0.05 * (one + 0.1 * two), full - 0.05 * one
    assert_apart_by_flips(full, full + 0.05 * one, near)
    with pytest.raises(AssertionError, match=r"0\.1 apart, at errors of 0\.05 and 0\.05"):
        assert_apart_by_flips(full, full + 0.05 * one, far)
    with pytest.raises(AssertionError, match="errors of 0.05 and 0.08"):
        assert_apart_by_flips(full, full + 0.05 * one, full + 0.08 * one)
