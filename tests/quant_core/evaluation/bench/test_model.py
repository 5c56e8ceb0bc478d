"""The bench's whole model in full precision and quantized."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from comfyui_nibble.kernels.dispatch import TORCH_INT8, choose
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.evaluation.bench import (
    model,
)
from comfyui_nibble.tests.support import relative_error

STORED = Target("cpu")  # on which layers run as they are stored
TINY_MODEL = model.Size(hidden=128, heads=2, double=1, single=1, image=12, text=5, channels=16, context=32)


def plain_flux(m, image, text, vector):
    """The model written out with plain functions, for one double and one single block."""
    full = lambda layer, x: F.linear(x, layer.weight, layer.bias)
    modulated = lambda x, scale, shift: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * (1 + scale)
        + shift
    )
    normed = lambda x, scale: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    tanh_gelu = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    tokens, heads, width = len(text) + len(image), 2, 64
    angle = torch.outer(
        torch.arange(tokens, dtype=torch.float64),
        10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2)),
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = lambda x: torch.view_as_real(
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turn
    ).flatten(-2)

    def split(block, qkv):
        q, k, v = (t.unflatten(-1, (heads, width)) for t in qkv.chunk(3, -1))
        return normed(q, block.query), normed(k, block.key), v

    def attend(q, k, v):
        weights = (torch.einsum("qhc,khc->hqk", turned(q), turned(k)) / width**0.5).softmax(-1)
        return torch.einsum("hqk,khc->qhc", weights, v.double()).flatten(1)

    act = vector * torch.sigmoid(vector)
    txt, img = full(m.text_in, text), full(m.image_in, image)
    both, pair = [], m.double_blocks[0]
    mods = {name: full(pair[name].mod, act).chunk(6, -1) for name in ("text", "image")}
    for name, x in (("text", txt), ("image", img)):
        shift, scale = mods[name][0], mods[name][1]
        both.append(split(pair[name], full(pair[name].qkv, modulated(x, scale, shift))))
    attended = attend(*(torch.cat(t) for t in zip(*both, strict=True)))
    streams = []
    for name, x, part in (("text", txt, attended[: len(text)]), ("image", img, attended[len(text) :])):
        _, _, gate, shift, scale, mlp_gate = mods[name]
        x = x + gate * full(pair[name].proj, part)
        streams.append(
            x + mlp_gate * full(pair[name].mlp2, tanh_gelu(full(pair[name].mlp0, modulated(x, scale, shift))))
        )
    x, block = torch.cat(streams), m.single_blocks[0]
    shift, scale, gate = full(block.mod, act).chunk(3, -1)
    out = full(block.linear1, modulated(x, scale, shift))
    attended = attend(*split(block, out[:, : 3 * 128]))
    x = x + gate * full(block.linear2, torch.cat((attended, tanh_gelu(out[:, 3 * 128 :])), -1))
    shift, scale = full(m.last_mod, act).chunk(2, -1)
    return full(m.last, modulated(x[len(text) :], scale, shift))


@torch.no_grad()
def test_float_model_is_the_plain_one():
    m, given = (
        model.build(TINY_MODEL, torch.float64, "cpu", None),
        model.inputs(TINY_MODEL, torch.float64, "cpu"),
    )
    for name, norm in m.named_parameters():
        if name.endswith((".query", ".key")):
            norm.copy_(torch.rand(norm.shape, dtype=norm.dtype) + 0.5)
    y = m(*given)
    assert y.shape == (1, 12, 16)
    # The model's rotation angles are fp32.
    assert relative_error(plain_flux(m, *(t[0] for t in given)), y[0]) < 1e-6


@torch.no_grad()
def test_a_batch_is_its_samples_one_by_one_and_sizes_change():
    m = model.build(TINY_MODEL, torch.float64, "cpu", None)
    size = replace(TINY_MODEL, batch=2, image=20)
    m.resize(size)
    given = model.inputs(size, torch.float64, "cpu")
    y = m(*given)
    assert y.shape == (2, 20, 16)
    for i in range(2):
        assert relative_error(m(*(t[i : i + 1] for t in given)), y[i : i + 1]) < 1e-9


@pytest.mark.parametrize("grain", ["group", "channel"])
@pytest.mark.parametrize("lora", [0, 8])
def test_quantized_model_runs_and_is_small(grain, lora):
    make = lambda grain: model.build(TINY_MODEL, torch.bfloat16, "cpu", grain, lora, STORED)
    m, plain = make(grain), make(None)
    step = lambda m: model.step(m, TINY_MODEL, torch.bfloat16, "cpu", repeats=1)
    found = step(m)
    assert found["finite"]
    assert found["repeats"] == 1
    # With a low rank of 32 or 40 at a hidden size of 128.
    assert found["block_bytes"] < (0.6 + 0.3 * bool(lora)) * step(plain)["block_bytes"]
    mlp2, linear2 = m.double_blocks[0]["image"].mlp2.spec, m.single_blocks[0].linear2.spec
    assert mlp2.parts[0].activation.unsigned is (grain == "group")
    assert [p.activation.unsigned for p in linear2.parts] == [False, True][: len(linear2.parts)]
    assert all(p.rotation for p in linear2.parts) is (grain == "channel")
    assert m.single_blocks[0].mod.spec.weight_only
    assert m.single_blocks[0].mod.spec.rank == lora


def test_layers_are_held_as_a_loaded_model_holds_them():
    int8 = Target("cpu", "int8")
    for grain in ("group", "channel"):
        m = model.build(TINY_MODEL, torch.float32, "cpu", grain, target=int8)
        for layer in (m.double_blocks[0]["image"].mlp2, m.single_blocks[0].mod):
            assert all(p.weight.bits == 8 for p in layer.spec.parts)
            assert layer.weight.shape == (layer.spec.out_features, layer.spec.in_features)
            assert choose(layer.spec, int8).path == TORCH_INT8
    hopper = Target("cuda", 90, (3, 6))
    m = model.build(TINY_MODEL, torch.bfloat16, "cpu", "group", target=hopper)
    assert m.single_blocks[0].linear1.spec.precision == "W8A8"
    assert m.single_blocks[0].mod.spec.precision == "W4A16"


def test_model_has_twelve_billion_weights():
    size = model.Size()
    count = lambda layers: sum(n * k for _, n, k, _ in layers) * size.hidden**2
    assert 11.8e9 < 2 * size.double * count(model.STREAM) + size.single * count(model.SINGLE) < 12e9
