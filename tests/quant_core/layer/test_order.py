"""Layers with an order of their own: all that is done with one equals the same done with the plain layer on
channels in that order."""

import json
from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.dispatch import quant_linear
from comfyui_nibble.kernels.lora import with_lora
from comfyui_nibble.kernels.operator.spec import SpecError
from comfyui_nibble.kernels.operator.text import parse
from comfyui_nibble.kernels.prologue import Gelu, LayerNormModulate
from comfyui_nibble.kernels.quant_linear import eager, naive
from comfyui_nibble.kernels.target import interpreter
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.formats.nibble import PackError, PackFile, save
from comfyui_nibble.quant_core.formats.spec_json import from_json, to_json
from comfyui_nibble.quant_core.layer.adapters import LowRank, Side
from comfyui_nibble.quant_core.layer.bake import bake
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer, QuantLinear
from comfyui_nibble.quant_core.layer.precisions import in_int8, w4a8, w8a8
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.training.student import Student
from comfyui_nibble.tests.codes import layer_error
from comfyui_nibble.tests.kernels.layers import with_branches
from comfyui_nibble.tests.support import relative_error

N, K = 96, 320


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def ordered(plain: QuantizedLayer, order) -> QuantizedLayer:
    return QuantizedLayer(
        plain.name, replace(plain.spec, order=True), plain.tensors | {"channel_order": order.int()}
    )


@pytest.fixture
def problem(make_problem):
    return make_problem(N, K, parts=(Part(0, 64), Part(64, K, after_gelu=True)), fit_tokens=1024)


@pytest.fixture
def order():
    return torch.randperm(K, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def plain(problem):
    """Two parts, the second with shifted codes, smoothing and a low rank."""
    return (
        METHODS["svdquant"]
        .fit(problem, METHODS["svdquant"].configured(rank=16, gptq=False, iterations=0))
        .layer
    )


@pytest.fixture
def layer(plain, order):
    return ordered(plain, order)


def lora(rank=4):
    return LowRank(randn(rank, K) * 0.1, randn(N, rank))


def test_every_path_gathers_x_alone(layer, plain, order):
    """Adapters' matrices are over the raw x; what stands before the layer has modulation over the raw x,
    too."""
    x, added = randn(7, K), [(randn(4, K), randn(32, 4), 16)]
    moved = [(down[:, order], up, first) for down, up, first in added]
    modulated = LayerNormModulate(randn(1, K), randn(1, K, seed=1))
    for run in (eager.quant_linear, naive.quant_linear, quant_linear):
        assert torch.equal(run(x, layer.spec, layer.tensors), run(x[:, order], plain.spec, plain.tensors))
        got, want = (
            run(x, *with_lora(layer.spec, layer.tensors, added, x.dtype)),
            run(x[:, order], *with_lora(plain.spec, plain.tensors, moved, x.dtype)),
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for before in (Gelu(), modulated):
        got = quant_linear(x[None], layer.spec, layer.tensors, prologue=before)
        assert torch.equal(got[0], plain(before(x)[:, order]))
    half = x.half()
    got = with_branches(half, layer.spec, layer.tensors, added, target=interpreter())
    want = with_branches(half[:, order], plain.spec, plain.tensors, moved, target=interpreter())
    assert relative_error(want, got) < 1e-3


def test_dequantized_weight_is_in_raw_order(layer, plain, order):
    assert torch.equal(layer.dequantize()[:, order], plain.dequantize())


def test_rows_devices_and_modules_keep_the_order(layer, plain, order):
    x = randn(5, K)
    pieces = layer.split_rows(["q", "k"], [32, 64])
    torch.testing.assert_close(torch.cat([p(x) for p in pieces], 1), layer(x), rtol=1e-5, atol=1e-5)
    assert pieces[0].tensors["channel_order"] is layer.tensors["channel_order"]
    module = QuantLinear(layer)
    assert torch.equal(module(x), layer(x))
    assert torch.equal(module.to(torch.float32).channel_order, order.int())
    assert layer.to("meta").tensors["channel_order"].is_meta
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), layer(x))


def test_other_precisions_keep_the_order(layer, plain, problem, order):
    x = randn(5, K)
    for other in (w4a8, in_int8):
        assert torch.equal(other(layer)(x), other(plain)(x[:, order]))
    moved = replace(problem, weight=problem.weight[:, order])
    got, want = w8a8(problem, layer), w8a8(moved, plain)
    assert {
        k: torch.equal(t, want.tensors[k]) for k, t in got.tensors.items() if k != "channel_order"
    } == dict.fromkeys(want.tensors, True)
    assert torch.equal(got.dequantize()[:, order], want.dequantize())


def test_training_starts_from_the_layer(make_problem, order):
    """A student computes what its start does, and gives it back, order and all."""
    problem = make_problem(N, K, fit_tokens=1024)
    moved = replace(problem, weight=problem.weight[:, order], statistics=None)
    start = ordered(METHODS["rtn"].fit(moved, METHODS["rtn"].config).layer, order)
    student, x = Student(problem, start, ("scale",)), randn(5, K)
    with torch.no_grad():
        assert layer_error(start(x), student(x), x, start.spec, start.tensors) < 1e-5
    again = student.layer()
    assert again.spec == start.spec
    assert all(torch.equal(t, again.tensors[k]) for k, t in start.tensors.items() if k != "weight_scale")


def test_sides_stand_in_raw_order(layer, plain, order):
    """Merged and baked, with every column and cut down with a dense difference: beside W in raw order, as
    without an order."""
    side = Side(N, K, low_rank=[lora()])
    spec, changed = side.merged(layer, torch.float32)
    x = randn(5, K)
    got = QuantizedLayer("", spec, layer.tensors | changed)(x) - layer(x)
    assert relative_error(x @ lora().down.T @ lora().up.T, got) < 1e-4
    done = bake(layer, side)
    assert relative_error(side.weight(layer.dequantize()), done.layer.dequantize()) < 4e-3  # bf16: 2.3e-3
    side.add_dense(randn(N, K) * 0.01)
    moved = Side(N, K, low_rank=[LowRank(lora().down[:, order], lora().up)], dense=side.dense[:, order])
    assert abs(bake(layer, side, rank=24).error - bake(plain, moved, rank=24).error) < 1e-4


def test_description(layer, plain):
    """Where there is no order a description is the one that older versions wrote and read."""
    assert "order" not in to_json(plain.spec)
    assert from_json(json.loads(json.dumps(to_json(plain.spec)))) == plain.spec
    assert from_json(json.loads(json.dumps(to_json(layer.spec)))) == layer.spec == parse(layer.spec.text)
    assert layer.spec.text != plain.spec.text
    assert layer.spec.shapes()["channel_order"] == (K,)
    assert layer.spec.as_int8().order
    assert layer.spec.without_order() == plain.spec


@pytest.mark.parametrize("bad", [0, K, -1])
def test_an_order_that_is_none_is_refused(tmp_path, layer, order, bad):
    """A file's numbers index memory: what is no permutation never becomes a layer."""
    wrong = order.int()
    wrong[3] = bad if bad else wrong[4]
    with pytest.raises(SpecError, match="layer x: channel_order is no permutation of 0 to 319"):
        QuantizedLayer("x", layer.spec, layer.tensors | {"channel_order": wrong})
    with pytest.raises(SpecError, match="channel_order has the dtype torch.int64"):
        QuantizedLayer("x", layer.spec, layer.tensors | {"channel_order": order})
    path = tmp_path / "model.safetensors"
    save(path, {"x": layer}, {}, "flux", {}, [])
    read = PackFile(path).layer("x")
    assert read.spec == layer.spec
    assert all(torch.equal(t, read.tensors[k]) for k, t in layer.tensors.items())
    data = path.read_bytes()
    at = data.index(order.int().numpy().tobytes())
    path.write_bytes(data[:at] + wrong.numpy().tobytes() + data[at + 4 * K :])
    with pytest.raises(PackError, match="channel_order is no permutation"):
        PackFile(path).layer("x")
