"""ComfyUI's nvfp4 layers run here as they are: outputs are comfy-kitchen's, bytes go back as they came."""

from dataclasses import replace

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.tensor import QuantizedTensor

from comfyui_nibble.kernels.at_load import paths_of
from comfyui_nibble.kernels.dispatch import quant_linear
from comfyui_nibble.kernels.target import Target, interpreter
from comfyui_nibble.quant_core.convert.inspect import describe
from comfyui_nibble.quant_core.formats.detect import open_quantized
from comfyui_nibble.quant_core.formats.kitchen import nvfp4
from comfyui_nibble.quant_core.layer.linear import same_bits
from comfyui_nibble.quant_core.layer.precisions import in_int8
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.kitchen import NAME, K, N, tokens, weight
from comfyui_nibble.tests.support import relative_error, sqnr_db

pytestmark = pytest.mark.quick
CONF = {"format": "nvfp4"}


@pytest.fixture(scope="module")
def parts():
    """comfy-kitchen's tensors of the test's weight."""
    return QuantizedTensor.from_float(weight(), "TensorCoreNVFP4Layout").state_dict("weight")


def kitchens(x, parts, bias, scale=None):
    """The product of both sides as its layout quantizes and reads them."""
    t = (torch.amax(x.abs()) / 2688).float() if scale is None else scale
    codes, blocked = kitchen.quantize_nvfp4(x, t, pad_16x=True)
    tx = kitchen.dequantize_nvfp4(codes, t, blocked, torch.float32)[: len(x)]
    w = kitchen.dequantize_nvfp4(
        parts["weight"], parts["weight_scale_2"], parts["weight_scale"], torch.float32
    )
    return tx @ w.T + bias.float()


def test_outputs_are_comfy_kitchens(write, state, parts):
    """1e-8 were seen; in bf16 3e-3, its own rounding, on the eager path and by the kernels."""
    model = open_quantized(write(parts, CONF))
    assert list(model.specs) == [NAME]
    assert model.specs[NAME].describe() == "W4A4 nvfp4 one scale a tensor"
    x, layer = tokens(), model.layer(NAME)
    assert relative_error(kitchens(x, parts, state[f"{NAME}.bias"]), layer(x)) < 1e-6
    half = x.bfloat16()
    want = kitchens(half, parts, state[f"{NAME}.bias"])
    assert relative_error(want, layer(half)) < 6e-3
    by_kernels = quant_linear(half, layer.spec, layer.tensors, target=interpreter())
    assert relative_error(want, by_kernels) < 6e-3


def test_the_scale_that_a_file_states(write, state, parts):
    """Half of what the tokens need: the largest values are cut."""
    x = tokens()
    scale = (x.abs().amax() / 2688 / 2).float()
    layer = open_quantized(write(parts | {"input_scale": scale}, CONF)).layer(NAME)
    assert layer.spec.parts[0].activation.fixed == scale.item()
    want = kitchens(x, parts, state[f"{NAME}.bias"], scale)
    assert relative_error(want, layer(x)) < 1e-6
    assert relative_error(want, kitchens(x, parts, state[f"{NAME}.bias"])) > 1e-2


def test_pre_quant_scale_is_a_smoothing(write, state, parts):
    """x times p is x over 1 / p but for two roundings of fp32: codes that lie in the middle may flip."""
    p = torch.rand(K, generator=torch.Generator().manual_seed(3)) + 0.5
    layer = open_quantized(write(parts | {"pre_quant_scale": p}, CONF)).layer(NAME)
    x = tokens()
    assert relative_error(kitchens(x * p, parts, state[f"{NAME}.bias"]), layer(x)) < 1e-5
    assert torch.allclose(layer.tensors["smooth_factor"] * p, torch.ones(K))
    bad = write(parts | {"pre_quant_scale": p * (p > 0.6)}, CONF)
    with pytest.raises(CheckpointError, match=f"layer {NAME}: pre_quant_scale: expected positive numbers"):
        open_quantized(bad).layer(NAME)


def test_full_precision_products_leave_x_alone(write, state, parts):
    layer = open_quantized(write(parts, CONF | {"full_precision_matrix_mult": True})).layer(NAME)
    w = kitchen.dequantize_nvfp4(
        parts["weight"], parts["weight_scale_2"], parts["weight_scale"], torch.float32
    )
    assert torch.equal(layer.dequantize(), w)
    assert relative_error(tokens() @ w.T + state[f"{NAME}.bias"].float(), layer(tokens())) < 1e-6


@pytest.mark.parametrize("found", [0.0, -1.0, torch.inf, torch.nan])
def test_an_impossible_scale_is_named(write, parts, found):
    path = write(parts | {"input_scale": torch.tensor(found)}, CONF)
    with pytest.raises(
        CheckpointError, match=rf"{NAME}.input_scale: expected a positive number, found {found}"
    ):
        open_quantized(path)


def test_paths_and_inspect(write, parts):
    path = write(parts, CONF)
    model = open_quantized(path)
    blackwell, older = Target("cuda", 120, (3, 6)), Target("cuda", 89, (3, 6))
    assert paths_of(model.specs, blackwell)[0] == {NAME: "fp4 tensor cores"}
    assert paths_of(model.specs, older)[0] == {NAME: "int8 tensor cores as W8A8"}
    said = describe(path, "cpu")
    assert said["kind"] == "ComfyUI quantized model (1 nvfp4)"
    assert said["stock ComfyUI"] == "loads it with Load Diffusion Model"
    assert said["layers"][NAME].startswith("W4A4 nvfp4 one scale a tensor")
    smoothed = write(parts | {"pre_quant_scale": torch.ones(K)}, CONF)
    assert describe(smoothed, "cpu")["stock ComfyUI"] == "loads it with Load Diffusion Model"


def test_eight_bits_for_other_cards(write, parts):
    layer = open_quantized(write(parts, CONF)).layer(NAME)
    eight = in_int8(layer)
    assert eight.spec.describe() == "W8A8 per channel"
    assert sqnr_db(layer.dequantize(), eight.dequantize()) > 38


def test_bytes_go_back_as_they_came(write, parts):
    again = nvfp4.stored_of(open_quantized(write(parts, CONF)).layer(NAME))
    assert set(again) == set(parts)
    for leaf, tensor in parts.items():
        assert again[leaf].dtype == tensor.dtype, leaf
        assert same_bits(again[leaf], tensor), leaf


def test_scales_of_rows_that_differ_by_powers_of_two(write, parts):
    layer = open_quantized(write(parts, CONF)).layer(NAME)
    inner, outer = (layer.tensors[leaf].clone() for leaf in ("weight_scale", "outer_scale"))
    with_tensors = lambda **more: replace(layer, tensors=layer.tensors | more)
    # The largest here is 448 and the smallest 45: halves and quarters are exact.
    low = (inner.float() / 4).to(inner.dtype)
    rows = torch.arange(N) % 3 == 0
    moved = torch.where(rows[:, None], low.view(torch.uint8), inner.view(torch.uint8)).view(inner.dtype)
    scaled = with_tensors(weight_scale=moved, outer_scale=torch.where(rows, outer * 4, outer))
    found, whole = nvfp4.one_scale(scaled)
    assert torch.equal(found.float() * whole, inner.float() * outer[0, 0])
    assert nvfp4.one_scale(with_tensors(outer_scale=torch.where(rows, outer * 1.5, outer))) is None
    # Moved by 2^16, the mantissas of the low rows are lost.
    far = with_tensors(outer_scale=torch.where(rows, outer * 2**-16, outer))
    assert nvfp4.one_scale(far) is None
    with pytest.raises(ValueError, match=f"layer {NAME}: its rows have scales of their own"):
        nvfp4.stored_of(far)
    nothing = torch.where(rows[:, None], 0, inner.view(torch.uint8)).view(inner.dtype)
    empty = with_tensors(weight_scale=nothing, outer_scale=torch.where(rows, outer * 1.7, outer))
    found, whole = nvfp4.one_scale(empty)
    assert torch.equal(found.float() * whole, nothing.float() * outer[0, 0])
