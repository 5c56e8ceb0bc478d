"""Layers with an order of their own in ComfyUI: int32 tensors as parameters, adapters over the raw input,
torch.compile."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.methods import by_name, fit_problem
from comfyui_nibble.tests.host.inside import attached_weight, forward, load, module, patcher_of, sample
from comfyui_nibble.tests.host.test_adapters import LINEAR2, MLP, QKV, SHAPES, adapter, randn, with_lora
from comfyui_nibble.tests.support import relative_error

KEYS = (QKV, MLP, LINEAR2)  # group scales; shifted codes behind a fused GELU; two parts


@pytest.fixture(scope="module")
def layers(comfy, tiny_state, one_thread):
    """{name: layer} of KEYS, fitted to weights in an order of their own."""
    shapes, method = {k: tuple(v.shape) for k, v in tiny_state.items()}, by_name("svdquant")
    config, made = method.configured(rank=8, gptq=False, iterations=0), {}
    for layer in detect(shapes).layers(shapes):
        if f"diffusion_model.{layer.name}" in KEYS:
            order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(1))
            weight, bias = tiny_state[f"{layer.name}.weight"].bfloat16(), tiny_state.get(f"{layer.name}.bias")
            plain = fit_problem(Problem(layer, weight[:, order], bias, None), method, config).layer
            spec, tensors = replace(plain.spec, order=True), plain.tensors | {"channel_order": order.int()}
            made[layer.name] = QuantizedLayer(layer.name, spec, tensors)
    return made


@pytest.fixture(scope="module")
def base(comfy, tiny_state, layers):
    return patcher_of(layers, {k: v for k, v in tiny_state.items() if k.rpartition(".")[0] not in layers})


def test_loads_samples_and_comes_out_again(base, full, layers):
    """Near the model in full precision: any channel in the wrong place is far from it."""
    from comfyui_nibble.nodes.host.build import unpatched

    assert relative_error(forward(full), forward(base)) < 0.2
    assert torch.isfinite(sample(base)).all()
    out, _ = unpatched(base)
    for name, layer in layers.items():
        held = module(load(base), f"diffusion_model.{name}").channel_order
        assert isinstance(held, torch.nn.Parameter)
        assert held.dtype == torch.int32
        assert out[name].spec == layer.spec
        assert torch.equal(out[name].tensors["channel_order"], layer.tensors["channel_order"])
    assert base.model_size() > sum(layer.nbytes for layer in layers.values())


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "diff"])
@pytest.mark.parametrize("key", KEYS)
def test_adapters_are_over_the_raw_input(comfy, base, layers, kind, key):
    """As ComfyUI merges the adapter into the dequantized weight; taken off, the layer is what it was."""
    layer, x = layers[key.removeprefix("diffusion_model.")], randn(1, 7, SHAPES[key][1])
    before = module(load(base), key)(x)
    patched = with_lora(base, adapter(kind, key))
    want = comfy.lora.calculate_weight(patched.patches[f"{key}.weight"], layer.dequantize(), f"{key}.weight")
    held = module(load(patched), key)
    assert relative_error(want, attached_weight(held)) < 5e-3
    got = held(x)
    assert relative_error(before, got) > 0.05
    if kind != "dora":  # its gain is on what the rounded input gives, too
        assert relative_error(x @ (want - layer.dequantize()).T, got - before) < 5e-3
    with torch.no_grad():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(held, backend="eager", fullgraph=True)(x), got)
    assert torch.equal(module(load(base), key)(x), before)
