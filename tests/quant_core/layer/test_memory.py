from dataclasses import replace
from math import prod

import pytest
import torch

from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.layer.memory import Memory, layer_bytes, predict, working_bytes
from comfyui_nibble.quant_core.methods import METHODS

G64 = LinearSpec(3072, 9216, (PartSpec(0, 3072, rank=32, smooth=True),))
CHANNEL = LinearSpec(3072, 3072, (PartSpec(0, 3072, WeightSpec(4, "channel"), ActivationSpec(4, "token")),))


def card(arch):
    return Target("cuda", arch, (3, 6))


@pytest.mark.parametrize("method", ["svdquant", "convrot", "splitquant", "robuq"])
def test_bytes_of_a_fitted_layer(make_problem, method):
    layer = METHODS[method].fit(make_problem(256, 512), METHODS[method].config).layer
    assert layer_bytes(layer.spec) == pytest.approx(layer.nbytes, rel=0.02)


def test_by_hand():
    n, k = 9216, 3072
    assert layer_bytes(G64) == n * k // 2 + 2 * (k // 64 * n + k + 32 * (k + n) + n)
    assert working_bytes(G64, 10) == 10 * (2 * k + k // 2 + 4 * (k // 64) + 4 * 32 + 2 * n)
    assert working_bytes(CHANNEL, 10) == 10 * (2 * k + k // 2 + 4 + 2 * k)


def test_hopper_holds_groups_in_8_bits():
    specs = {"a": G64, "b": CHANNEL}
    ampere, hopper = predict(specs, 1000, card(86)), predict(specs, 1000, card(90))
    assert ampere.weights == 1000 + layer_bytes(G64) + layer_bytes(CHANNEL)
    assert (ampere.int8, hopper.int8) == (0, 1)
    assert (
        hopper.weights - ampere.weights
        == layer_bytes(G64.as_int8()) - layer_bytes(G64)
        > prod((9216, 3072)) // 2 * 0.8
    )
    assert ampere.layer == working_bytes(G64, 4608)


def test_weight_only_layers_work_on_few_rows():
    wo = replace(G64, parts=(replace(G64.parts[0], activation=None, smooth=False),))
    assert predict({"a": wo}, 0, card(86)).layer == 0


@pytest.mark.parametrize(
    ("free", "total", "verdict"),
    [(8, 24, "the weights fit whole"), (5, 24, "the weights fit once other models are unloaded"),
    (4, 6, "ComfyUI will load it in part"), (None, None, "no GPU, it runs on the CPU")],
)  # fmt: skip
def test_verdict(free, total, verdict):
    gib = lambda n: None if n is None else n * 2**30
    lines = Memory(6 * 2**30, 2**29, 4608, 3, gib(free), gib(total)).lines()
    assert verdict in lines[1]
    assert lines[0].startswith("on a card: 6,144 MiB of weights, 3 layers in 8 bits")


def test_here():
    found = predict({"a": G64}, 0, card(86))
    assert (found.total is None) == (not torch.cuda.is_available())
