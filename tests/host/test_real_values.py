"""Code that casts the weight of a packed layer itself, as ComfyUI after 0.33 does in places: the right
numbers, or a refusal by name."""

import copy
import gc
import re
import weakref

import pytest
import torch
from torch.nn.functional import linear, silu

from comfyui_nibble.tests.host.inside import attached_weight, load, module
from comfyui_nibble.tests.host.test_adapters import (
    LINEAR2,
    MLP,
    MODULATION,
    QKV,
    SHAPES,
    adapter,
    randn,
    with_lora,
)
from comfyui_nibble.tests.support import relative_error

KINDS = (None, "lora", "lora and bias", "dora", "lokr", "diff")


@pytest.fixture
def ops(comfy):
    import comfy.ops

    return comfy.ops


@pytest.fixture
def refusal(comfy):
    from comfyui_nibble.nodes.host.real_values import PackedWeightError

    return PackedWeightError


def as_fp16_accumulation(ops, layer, x, activation):
    """How ComfyUI after 0.33 computes `linear_input_act` of a layer in fp16 under --fast fp16_accumulation:
    not by calling it, unless it says that it wants none of that."""
    if getattr(layer, "_full_precision_mm", False):
        return layer(activation(x))
    weight, bias, stream = ops.cast_bias_weight(layer, x, offloadable=True)
    try:
        return linear(activation(x), weight, bias)
    finally:
        ops.uncast_bias_weight(layer, weight, bias, stream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", [QKV, MLP, LINEAR2, MODULATION])
def test_cast_weight_and_bias_are_those_that_the_layer_applies(ops, base, full, key, kind):
    """Adapters are in the weight; the bias is the model's own, without the correction for shifted activations
    (0.2 to 0.4 of it)."""
    patched = load(base if kind is None else with_lora(base, adapter(kind, key)))
    layer, x = module(patched, key), randn(3, SHAPES[key][1])
    own = module(full, key).bias.float() + (randn(SHAPES[key][0]) if kind == "lora and bias" else 0)
    weight, bias, stream = ops.cast_bias_weight(layer, x, offloadable=True)
    assert torch.equal(weight, attached_weight(layer))
    assert relative_error(own, bias) < 3e-3  # bf16
    ops.uncast_bias_weight(layer, weight, bias, stream)
    half, _ = ops.cast_bias_weight(layer, x.bfloat16())
    assert torch.equal(half, weight.bfloat16())
    load(base)


@pytest.mark.parametrize("key", [QKV, MLP])
def test_layer_computed_from_its_cast_is_the_layer(ops, base, key):
    """What differs is x, quantized to 4 or 8 bits in the one and not in the other."""
    layer, x = module(load(base), key), randn(64, SHAPES[key][1]).abs()
    wanted = linear(x, layer.layer().dequantize(), layer.convert_bias(layer.bias).float())
    with ops.CastBiasWeightContext(layer, x, offloadable=True) as (weight, bias):
        assert relative_error(wanted, linear(x, weight, bias)) < 1e-6
    least = 0.002 if layer.spec.precision == "W8A8" else 0.01
    assert least < relative_error(wanted, layer.layer()(x)) < 15 * least


def test_fused_input_activation_stays_on_the_quantized_kernel(ops, base):
    layer, x = module(load(base), LINEAR2), randn(4, SHAPES[LINEAR2][1])
    assert torch.equal(as_fp16_accumulation(ops, layer, x, silu), layer(silu(x)))
    del layer._full_precision_mm  # a ComfyUI that does not look at it
    out = as_fp16_accumulation(ops, layer, x, silu)
    layer._full_precision_mm = True
    assert torch.equal(out, linear(silu(x), layer.real_weight(x), layer.real_bias(layer.bias.to(x.dtype))))


@pytest.mark.parametrize(
    "cast",
    [
        lambda ops, w: w.to(torch.float32),
        lambda ops, w: w.to(device="cpu", dtype=torch.float32),
        lambda ops, w: w.float(),
        lambda ops, w: w.type(torch.float32),
        lambda ops, w: w.to(torch.ones(1)),
        lambda ops, w: ops.cast_to_input(w, torch.ones(1)),
    ],
)
def test_weight_cast_alone_gives_real_values_or_is_refused(ops, base, refusal, cast):
    load(base)
    layer = module(base, QKV)
    assert torch.equal(cast(ops, layer.weight), layer.layer().dequantize())
    shifted = module(base, MLP)
    codes = dict(shifted.spec.weight_shapes)["weight"]
    found = re.escape(
        "double_blocks.0.img_mlp.2: something asked for its weight as torch.float32 and found packed codes "
        f"(torch.int8, {codes})"
    )
    with pytest.raises(refusal, match=found):
        cast(ops, shifted.weight)


def test_moves_and_copies_are_of_the_codes(base):
    layer = module(load(base), MLP)
    for moved in (
        layer.weight.to("cpu"),
        layer.weight.to("cpu", copy=True),
        layer.weight.to(dtype=None, copy=True),
        layer.weight.type(torch.int8),
    ):
        assert moved.data.dtype == torch.int8
        assert torch.equal(moved, layer.weight.data)


def test_x_in_the_dtype_of_the_weight_is_x_and_in_that_of_its_codes_is_refused(base, refusal):
    layer, x = module(load(base), QKV), randn(2, 256)
    assert torch.equal(layer(x.to(layer.weight.dtype)), layer(x))
    with pytest.raises(
        refusal, match=re.escape("double_blocks.0.img_attn.qkv: expected x in floats, found torch.int8")
    ):
        layer(x.to(layer.weight.data.dtype))


def test_functions_of_others_act_on_real_values_and_are_seen(ops, base):
    """A cast takes what another pack puts there; the packed layer itself, which cannot, says so. Emptied, the
    lists keep their own."""
    layer, x = module(load(base), QKV), randn(2, 256)
    layer.weight_function.append(lambda w: 2 * w)
    weight, _ = ops.cast_bias_weight(layer, x)
    assert torch.equal(weight, 2 * layer.layer().dequantize())
    with pytest.raises(RuntimeError, match="a weight patch reached a packed layer"):
        layer(x)
    layer.weight_function = layer.bias_function = []
    weight, bias = ops.cast_bias_weight(layer, x)
    assert torch.equal(weight, layer.layer().dequantize())
    assert torch.equal(bias, layer.bias.to(x.dtype))
    assert layer(x).shape == (2, 768)


def test_layers_in_16_bit_are_cast_as_ever(ops, base, full):
    key = "diffusion_model.img_in"
    for given, wanted in zip(
        *(ops.cast_bias_weight(module(load(m), key), randn(1, 64)) for m in (base, full)), strict=True
    ):
        assert torch.equal(given, wanted)
    load(base)


def test_copy_casts_its_own_weight(ops, base):
    layer = copy.deepcopy(module(load(base), QKV))
    layer.weight_scale.data.mul_(2)
    weight, _ = ops.cast_bias_weight(layer, randn(2, 256))
    assert relative_error(layer.layer().dequantize(), weight) == 0
    assert relative_error(module(base, QKV).layer().dequantize(), weight) > 0.5


def test_dropped_layer_is_freed_at_once(base):
    """And with it the gigabytes of a model, not at the next garbage collection."""
    layer = copy.deepcopy(module(load(base), QKV))
    dropped = weakref.ref(layer)
    gc.collect()
    gc.disable()
    try:
        del layer
        assert dropped() is None
    finally:
        gc.enable()
