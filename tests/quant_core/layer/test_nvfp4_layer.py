"""The operator on the nvfp4 grid: its specification, its eager path, and all that is done with layers."""

from dataclasses import replace

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.float_utils import to_blocked

from comfyui_nibble.kernels import dispatch
from comfyui_nibble.kernels.operator import text
from comfyui_nibble.kernels.operator.codes import NVFP4, ActivationSpec
from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.quant_core.formats import nibble, spec_json
from comfyui_nibble.quant_core.formats.kitchen.write import format_of
from comfyui_nibble.quant_core.layer.adapters import LowRank, Side
from comfyui_nibble.quant_core.layer.bake import bake
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.memory import layer_bytes
from comfyui_nibble.quant_core.layer.precisions import higher, in_int8
from comfyui_nibble.quant_core.layer.stack import resmooth, split_columns, stack_columns, stack_rows
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.kernels.layers import (
    NVFP4_ACT,
    NVFP4_WEIGHT,
    inputs,
    output_error,
    random_tensors,
    side_by_side,
    spec_of,
    with_branches,
)
from comfyui_nibble.tests.support import relative_error, sqnr_db

K, N = 256, 48
SIX = ActivationSpec(group=16, grid=NVFP4)
TENSOR = replace(SIX, outer="tensor")
FIXED = replace(TENSOR, fixed=0.1 / 3)
PLAIN = spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT)
HALVES = (64, NVFP4_ACT, NVFP4_WEIGHT), (192, NVFP4_ACT, NVFP4_WEIGHT)
SPECS = {
    "plain": PLAIN,
    "the largest at 6": spec_of(K, N, SIX, NVFP4_WEIGHT),
    "one scale": spec_of(K, N, TENSOR, NVFP4_WEIGHT, smooth=True, rotation=64, rank=16),
    "a fixed scale": spec_of(K, N, FIXED, NVFP4_WEIGHT),
    "no bias": spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, bias=False),
    "smooth, low rank": spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, smooth=True, rank=16),
    "rotated": spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, smooth=True, rotation=64, rank=16),
    "principal": spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, smooth=True, rank=16, principal=4),
    "two parts": side_by_side(N, *HALVES, smooth=True, rank=8),
    "weight-only": spec_of(K, N, None, NVFP4_WEIGHT, smooth=True, rank=8),
    "padded": replace(PLAIN, in_features=K - 20, padding=20),
    "ordered": replace(PLAIN, order=True),
}


def layer_of(spec, seed=0):
    tensors = random_tensors(spec, seed)
    if spec.order:
        order = torch.randperm(spec.width, generator=torch.Generator().manual_seed(seed)).int()
        tensors["channel_order"] = order
    if spec.rank:
        tensors["proj_down"] *= 0.05  # principal components of no length to speak of
    return QuantizedLayer("layer", spec, tensors)


@pytest.mark.quick
@pytest.mark.parametrize("name", SPECS)
def test_eager_is_the_specification(name):
    layer = layer_of(SPECS[name])
    x = inputs(21, layer.spec.in_features)
    assert output_error(layer(x), x, layer.spec, layer.tensors) < 1e-5
    for dtype, limit in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        small = x.to(dtype)
        y = dispatch.quant_linear(small, layer.spec, layer.tensors)
        assert y.dtype == dtype
        assert output_error(y, small, layer.spec, layer.tensors) < limit
    assert dispatch.choose(layer.spec, "cpu").path == "eager"


@pytest.mark.quick
def test_a_layer_is_comfy_kitchens():
    """Weights and tokens as its eager ops dequantize them, one token as a tensor of its own."""
    layer = layer_of(spec_of(K, N, SIX, NVFP4_WEIGHT, bias=False))
    layer.tensors["outer_scale"][:] = 0.37
    x = inputs(5, K)
    scale = layer.tensors["weight_scale"]
    padded = torch.nn.functional.pad(scale.view(torch.uint8), (0, 0, 0, 128 - N))
    blocked = to_blocked(padded, flatten=False).view(torch.float8_e4m3fn)
    codes = torch.nn.functional.pad(layer.tensors["weight"].view(torch.uint8), (0, 0, 0, 128 - N))
    weight = kitchen.dequantize_nvfp4(codes, torch.tensor(0.37), blocked, torch.float32, hi_first=False)[:N]
    rows = []
    for row in x:
        t = row.abs().amax() / 2688
        taken = kitchen.quantize_nvfp4(row[None], t, pad_16x=True, hi_first=False)
        rows.append(kitchen.dequantize_nvfp4(taken[0], t, taken[1], torch.float32, hi_first=False)[0])
    assert relative_error(torch.stack(rows) @ weight.T, layer(x)) < 1e-6


@pytest.mark.quick
def test_lora_beside_it():
    layer = layer_of(SPECS["rotated"])
    x, lora = inputs(9, K), [(inputs(4, K, seed=5) * 0.05, inputs(N, 4, seed=6), 0)]
    y = with_branches(x, layer.spec, layer.tensors, lora)
    assert output_error(y, x, layer.spec, layer.tensors, lora) < 1e-5


FILED = ("plain", "the largest at 6", "one scale", "a fixed scale", "two parts", "principal", "weight-only")


@pytest.mark.parametrize("name", FILED)
def test_file_and_description(name, tmp_path):
    layer, path = layer_of(SPECS[name]), tmp_path / "model.safetensors"
    assert spec_json.from_json(spec_json.to_json(layer.spec)) == layer.spec
    nibble.save(path, {"layer": layer}, {}, "flux", {"method": "svdquant", "settings": {"grid": "nvfp4"}}, [])
    found = nibble.PackFile(path)
    again = found.layer("layer")
    assert again.spec == layer.spec
    assert all(
        torch.equal(again.tensors[k].view(torch.uint8), t.view(torch.uint8)) for k, t in layer.tensors.items()
    )
    words = again.spec.describe()
    assert "nvfp4" in words
    assert ("scale a tensor" in words) == (name in ("one scale", "a fixed scale"))
    assert found.provenance["settings"]["grid"] == "nvfp4"
    # With 16-bit side data, as methods write it.
    half = {
        k: t.bfloat16() if k in ("smooth_factor", "proj_down", "proj_up", "bias") else t
        for k, t in layer.tensors.items()
    }
    assert sum(t.nbytes for t in half.values()) == layer_bytes(layer.spec)


@pytest.mark.quick
def test_a_damaged_scale_is_named_where_a_layer_is_to_run(tmp_path):
    """Torch compares no e4m3 numbers by itself."""
    layer, path = layer_of(PLAIN), tmp_path / "model.safetensors"
    nibble.save(path, {"layer": layer}, {}, "flux", {}, [])
    assert nibble.PackFile(path).sound_layer("layer").spec == PLAIN
    layer.tensors["weight_scale"].view(torch.uint8)[3, 4] = 0x7F
    nibble.save(path, {"layer": layer}, {}, "flux", {}, [])
    with pytest.raises(CheckpointError, match="model.safetensors: layer.weight_scale: NaN or Inf"):
        nibble.PackFile(path).sound_layer("layer")


@pytest.mark.quick
def test_files_without_a_scale_of_the_tensor_do_not_speak_of_it():
    assert "outer" not in str(spec_json.to_json(PLAIN)["parts"])
    data = spec_json.to_json(SPECS["a fixed scale"])
    assert data["parts"][0]["activation"]["fixed"] == 0.1 / 3
    assert text.parse(SPECS["a fixed scale"].text) == SPECS["a fixed scale"]


@pytest.mark.quick
def test_files_of_integer_layers_keep_their_version(tmp_path):
    spec = spec_of(K, N)
    assert "grid" not in str(spec_json.to_json(spec))
    layer = QuantizedLayer("layer", spec, random_tensors(spec))
    nibble.save(tmp_path / "a.safetensors", {"layer": layer}, {}, "flux", {}, [])
    text = (tmp_path / "a.safetensors").read_bytes()
    assert b'\\"version\\": 3' in text


@pytest.mark.quick
def test_rows_and_columns_are_exact():
    layer, x = layer_of(SPECS["two parts"]), inputs(7, K)
    top, bottom = layer.split_rows(["a", "b"], [16, 32])
    joined = stack_rows("layer", [top, bottom], share=True)
    assert torch.equal(joined.dequantize(), layer.dequantize())
    left, right = split_columns(layer, ["a", "b"])
    assert relative_error(layer(x), left(x[:, :64]) + right(x[:, 64:])) < 1e-6
    again = stack_columns("layer", [left, right])
    assert torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.quick
def test_a_gain_goes_into_the_outer_scale():
    layer, side = layer_of(SPECS["smooth, low rank"]), Side(N, K)
    side.scale_rows(inputs(1, N)[0].abs() + 0.5)
    done, x = bake(layer, side).layer, inputs(9, K)
    bias = layer.tensors["bias"]
    assert relative_error((layer(x) - bias) * side.gain + bias, done(x)) < 1e-4
    assert torch.equal(
        done.tensors["weight_scale"].view(torch.uint8), layer.tensors["weight_scale"].view(torch.uint8)
    )
    lora = Side(N, K, low_rank=[LowRank(inputs(4, K) * 0.1, inputs(N, 4))])
    assert bake(layer, lora).error < 1e-4


@pytest.mark.quick
def test_another_smoothing():
    layer = layer_of(spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, smooth=True))
    smooth = layer.tensors["smooth_factor"] * (
        0.8 + 0.4 * torch.rand(K, generator=torch.Generator().manual_seed(1))
    )
    done, db = resmooth(layer, smooth)
    assert db > 18
    assert abs(sqnr_db(layer.dequantize(), done.dequantize()) - db) < 0.1


@pytest.mark.quick
@pytest.mark.parametrize("name", ["two parts", "rotated", "one scale", "weight-only"])
def test_in_eight_bits(name):
    layer = layer_of(SPECS[name])
    again, x = in_int8(layer), inputs(9, K)
    assert "outer_scale" not in again.tensors
    assert again.spec.grid == "int"
    assert {p.weight.bits for p in again.spec.parts} == {8}
    assert sqnr_db(layer.dequantize(), again.dequantize()) > 38
    assert sqnr_db(naive.quant_linear(x, layer.spec, layer.tensors), again(x)) > 15
    assert higher(layer.spec) == ([] if name == "weight-only" else ["W8A8", "16 bit"])


@pytest.mark.quick
def test_formats_without_it_say_so():
    assert "nvfp4" in format_of(PLAIN)[1]


@pytest.mark.quick
def test_wrong_dtypes_are_named():
    tensors = random_tensors(PLAIN)
    with pytest.raises(ValueError, match="layer x: weight_scale has the dtype torch.float32"):
        QuantizedLayer("x", PLAIN, tensors | {"weight_scale": tensors["weight_scale"].float()})
