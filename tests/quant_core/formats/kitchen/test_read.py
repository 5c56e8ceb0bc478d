"""Files in comfy-kitchen's formats; its own eager ops say what their layers compute."""

import json

import pytest
import torch
from comfy_kitchen.backends.eager import awq, quantization
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreAWQW4A16Layout, TensorCoreSVDQuantW4A4Layout
from safetensors.torch import load_file, save_file

from comfyui_nibble.kernels.operator.packing import pack, unpack
from comfyui_nibble.kernels.operator.spec import GELU_SHIFT
from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen_out
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile, is_kitchen
from comfyui_nibble.tests.assets.kitchen import (
    KITCHEN,
    NAME,
    SHAPES,
    K,
    N,
    marker,
    svdquant,
    tiles,
    tokens,
    weight,
)
from comfyui_nibble.tests.codes import layer_error
from comfyui_nibble.tests.support import relative_error

pytestmark = pytest.mark.quick


def check(path, theirs, x, limit=1e-5):
    """Our layer, by the fp32 path and by the exact specification, against comfy-kitchen's eager forward."""
    layer = KitchenFile(path).layer(NAME)
    assert layer_error(theirs, layer(x), x, layer.spec, layer.tensors) < limit
    assert (
        layer_error(theirs, naive.quant_linear(x, layer.spec, layer.tensors), x, layer.spec, layer.tensors)
        < limit
    )
    return layer


# -- numerics


def svdquant_forward(t, x, bias, unsigned):
    """Of a QuantizedTensor, in fp32."""
    f = {k: v if k == "weight" else v.float() for k, v in t.items()}
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=f["weight_scale"], orig_dtype=torch.float32, orig_shape=(N, K), proj_down=f["proj_down"],
        proj_up=f["proj_up"],
        smooth_factor=f["smooth_factor"], act_unsigned=unsigned,
    )  # fmt: skip
    return torch.nn.functional.linear(
        x, QuantizedTensor(t["weight"], "TensorCoreSVDQuantW4A4Layout", params), bias.float()
    )


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("style", ["comfy-kitchen", "comfy-quants"])
@pytest.mark.parametrize("tiled", [False, True])
def test_svdquant(write, state, unsigned, style, tiled):
    natural = svdquant(unsigned)
    stored = tiles(natural) if tiled else natural
    if style == "comfy-kitchen":
        stored = {KITCHEN.get(k, k): v for k, v in stored.items()}
    x, bias = tokens(unsigned), state[f"{NAME}.bias"]
    theirs = svdquant_forward(tiles(natural) if tiled else natural, x, bias, unsigned)
    layer = check(write(stored, {"format": "svdquant_w4a4", "act_unsigned": unsigned}), theirs, x)
    assert all(torch.equal(layer.tensors[k], t) for k, t in natural.items())
    # The shift is in the file's bias already: ours is that bias.
    assert torch.equal(layer.tensors["bias"], bias)
    assert layer.spec.parts[0].activation.shift == (GELU_SHIFT if unsigned else 0)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_convrot(write, state, size):
    made = QuantizedTensor.from_float(weight(), "TensorCoreConvRotW4A4Layout", convrot_groupsize=size)
    stored = made.state_dict("weight")
    path = write(stored, {"format": "convrot_w4a4", "convrot_groupsize": size})
    theirs = torch.nn.functional.linear(tokens(), made, state[f"{NAME}.bias"].float())
    layer = check(path, theirs, tokens())
    assert layer.spec.describe() == f"W4A4 per channel H{size}"
    assert relative_error(made.dequantize(), layer.dequantize()) < 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": True}, {"per_channel": True, "convrot": True, "convrot_groupsize": 64}]
)
def test_int8(write, state, options):
    made = QuantizedTensor.from_float(weight(), "TensorWiseINT8Layout", **options)
    conf = {"format": "int8_tensorwise"} | {k: v for k, v in options.items() if k.startswith("convrot")}
    layer = check(
        write(made.state_dict("weight"), conf),
        torch.nn.functional.linear(tokens(), made, state[f"{NAME}.bias"].float()),
        tokens(),
    )
    assert layer.spec.parts[0].weight.granularity == ("channel" if options else "tensor")


def test_int8_as_comfy_quants_marks_it(write):
    made = QuantizedTensor.from_float(weight(), "TensorWiseINT8Layout", per_channel=True, convrot=True)
    path = write(made.state_dict("weight"), {"convrot": True, "convrot_groupsize": 256, "per_row": True})
    assert KitchenFile(path).specs[NAME].describe() == "W8A8 per channel H256"


def test_int8_activations_of_convrot(write, state):
    """linear_dtype int8: on cards comfy-kitchen quantizes x to 8 bits then. Its int8_linear on the unpacked
    codes is the same product."""
    made = QuantizedTensor.from_float(weight(), "TensorCoreConvRotW4A4Layout", convrot_groupsize=64)
    stored = made.state_dict("weight")
    path = write(
        stored, {"format": "convrot_w4a4", "params": {"convrot_groupsize": 64, "linear_dtype": "int8"}}
    )
    theirs = quantization.int8_linear(
        tokens(),
        unpack(stored["weight"], 4),
        stored["weight_scale"],
        state[f"{NAME}.bias"],
        torch.float32,
        True,
        64,
    )
    check(path, theirs, tokens())


@pytest.mark.parametrize("conf", [{"format": "convrot_w4a4"}, {"format": "int8_tensorwise", "convrot": True}])
def test_full_precision_products(write, state, conf):
    """full_precision_matrix_mult: ComfyUI dequantizes the weight and leaves x as it is."""
    layout = "TensorCoreConvRotW4A4Layout" if conf["format"] == "convrot_w4a4" else "TensorWiseINT8Layout"
    made = QuantizedTensor.from_float(
        weight(), layout, **({"per_channel": True, "convrot": True} if "convrot" in conf else {})
    )
    path = write(made.state_dict("weight"), conf | {"full_precision_matrix_mult": True})
    layer = check(path, tokens() @ made.dequantize().T + state[f"{NAME}.bias"].float(), tokens())
    assert layer.spec.weight_only


@pytest.mark.parametrize("zeros", ["weight_zeros", "weight_zero"])
def test_awq(write, state, zeros):
    g = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (N, K), generator=g)
    scale = (torch.rand(K // 64, N, generator=g) * 0.01 + 0.002).bfloat16()
    zero = (0.02 * torch.randn(K // 64, N, generator=g)).bfloat16()
    bias = state[f"{NAME}.bias"].float()
    path = write(
        {"weight": pack(codes, 4), "weight_scale": scale, zeros: zero},
        {"format": "awq_w4a16", "group_size": 64},
    )
    theirs = awq.gemv_awq_w4a16(tokens(), pack(codes, 4), scale.float(), zero.float(), bias)
    layer = check(path, theirs, tokens())
    assert layer.spec.weight_only
    params = TensorCoreAWQW4A16Layout.Params(
        scale=scale.float(), orig_dtype=torch.float32, orig_shape=(N, K), zeros=zero.float()
    )
    assert (
        relative_error(TensorCoreAWQW4A16Layout.dequantize(pack(codes, 4), params), layer.dequantize()) < 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_bf16(write, dtype):
    """Beside a layer of ours; alone the file is none for this pack."""
    made = QuantizedTensor.from_float(weight(), "TensorWiseINT8Layout", per_channel=True).state_dict("weight")
    path = write(made, {"format": "int8_tensorwise"})
    tensors, other, scale = load_file(path), "double_blocks.0.txt_mlp.2", torch.tensor(0.0125)
    tensors[f"{other}.weight"] = (tensors[f"{other}.weight"].float() / scale).to(dtype)
    conf = {"format": str(dtype).removeprefix("torch.")}
    save_file(
        tensors
        | {
            f"{other}.weight_scale": scale,
            f"{other}.input_scale": scale.clone(),
            f"{other}.comfy_quant": marker(conf),
        },
        path,
    )
    opened = KitchenFile(path)
    assert list(opened.specs) == [NAME]
    assert f"{other}.weight" in opened.rest
    assert not any(k.endswith(("scale", "comfy_quant")) and "norm" not in k for k in opened.rest)
    want = (tensors[f"{other}.weight"].float() * scale).bfloat16()
    assert torch.equal(opened.tensor(f"{other}.weight"), want)
    assert torch.equal(opened.tensor(f"{other}.bias"), tensors[f"{other}.bias"])
    assert f"{conf['format']} layers (1) are read as bf16" in opened.notes[0]


# -- names and shapes


@pytest.fixture(scope="module")
def convrot():
    return QuantizedTensor.from_float(weight(), "TensorCoreConvRotW4A4Layout").state_dict("weight")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("where", ["tensor", "header", "header without prefix", "both"])
def test_prefixes_and_both_declarations(write, convrot, prefix, where):
    conf = {"format": "convrot_w4a4", "convrot_groupsize": 256}
    name = NAME if where == "header without prefix" else prefix + NAME
    path = write(
        convrot,
        None if where.startswith("header") else conf,
        {name: conf} if where != "tensor" else None,
        prefix=prefix,
    )
    opened = KitchenFile(path)
    assert opened.family == "flux"
    assert opened.logical_shapes() == SHAPES
    assert opened.kind == "ComfyUI quantized model (1 convrot_w4a4)"
    assert torch.equal(opened.layer(NAME).tensors["weight"], convrot["weight"])
    assert opened.notes == ()
    assert set(opened.rest) == {k for k in SHAPES if not k.startswith(f"{NAME}.")}
    assert opened.shape("img_in.weight") == opened.tensor("img_in.weight").shape == SHAPES["img_in.weight"]


def test_a_whole_checkpoint(write, int8):
    path = write(int8, {"format": "int8_tensorwise"}, prefix="model.diffusion_model.")
    encoder = "text_encoders.t5.block.0"
    tensors = load_file(path) | {
        f"{encoder}.weight": torch.zeros(4, 4, dtype=torch.int8),
        f"{encoder}.weight_scale": torch.ones(()),
    }
    header = {"layers": {encoder: {"format": "int8_tensorwise"}}}
    save_file(tensors, path, metadata={"_quantization_metadata": json.dumps(header)})
    opened = KitchenFile(path)
    assert list(opened.specs) == [NAME]
    assert opened.notes == (
        "tensors outside of the diffusion model (2), of text encoders or a VAE, are left out",
    )


def test_sniffing(write, int8):
    assert is_kitchen(load_file(write(int8, {"format": "int8_tensorwise"})), None)
    assert is_kitchen(["a.weight"], {"_quantization_metadata": "{}"})
    assert not is_kitchen(["a.weight", "comfy_quant_notes"], {"format": "pt"})


def test_a_static_input_scale_is_not_used(write, int8):
    opened = KitchenFile(write(int8 | {"input_scale": torch.ones(())}, {"format": "int8_tensorwise"}))
    assert "the input_scale of layers (1) is not used" in opened.notes[0]
    assert not any("input_scale" in k for k in opened.rest)


# -- round trips


@pytest.mark.parametrize("unsigned", [False, True])
def test_svdquant_comes_back_with_the_same_bytes(write, tmp_path, unsigned):
    stored = {KITCHEN.get(k, k): v for k, v in svdquant(unsigned).items()}
    conf = {"format": "svdquant_w4a4"} | ({"act_unsigned": True} if unsigned else {})
    path = write(stored, conf, {NAME: conf})
    opened = KitchenFile(path)
    again = tmp_path / "again.safetensors"
    layers = {n: opened.layer(n) for n in opened.specs}
    kitchen_out.save(
        again,
        layers,
        {k: opened.tensor(k) for k in opened.rest},
        {"provenance": {"method": "x"}, "report": []},
    )
    before, after = load_file(path), load_file(again)
    assert set(before) == set(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert KitchenFile(again).specs == opened.specs
    assert KitchenFile(again).provenance == {"method": "x"}
