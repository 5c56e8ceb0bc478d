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
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen_out
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile, is_kitchen
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state
from comfyui_nibble.tests.codes import layer_error
from comfyui_nibble.tests.support import outlier_tokens, relative_error

pytestmark = pytest.mark.quick

HIDDEN = 256
NAME, N, K = "double_blocks.0.img_mlp.2", HIDDEN, 4 * HIDDEN  # the layer that tests replace
SHAPES = flux_shapes(1, 0, HIDDEN, 64, 64)


@pytest.fixture(scope="module")
def state():
    return random_state(SHAPES)


def marker(conf):
    return torch.tensor(
        list((conf if isinstance(conf, str) else json.dumps(conf)).encode()), dtype=torch.uint8
    )


def written(path, state, tensors, conf=None, header=None, name=NAME, prefix=""):
    """A model with one layer replaced. tensors: {leaf: tensor}; conf, header: the two declarations."""
    out = {k: t for k, t in state.items() if k != f"{name}.weight"} | {
        f"{name}.{leaf}": t for leaf, t in tensors.items()
    }
    if conf is not None:
        out[f"{name}.comfy_quant"] = conf if isinstance(conf, torch.Tensor) else marker(conf)
    metadata = (
        {}
        if header is None
        else {"_quantization_metadata": header if isinstance(header, str) else json.dumps({"layers": header})}
    )
    save_file({prefix + k: t.contiguous() for k, t in out.items()}, path, metadata=metadata)
    return path


@pytest.fixture
def write(tmp_path, state):
    return lambda *args, **kwargs: written(tmp_path / "model.safetensors", state, *args, **kwargs)


def weight(seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5


def tokens(after_gelu=False):
    return outlier_tokens(37, K, 5, after_gelu, strength=8.0)


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


def svdquant(unsigned, seed=0, rank=16):
    g = torch.Generator().manual_seed(seed)
    half = lambda *shape, by=1.0: (by * torch.randn(*shape, generator=g)).bfloat16()
    return {
        "weight": pack(torch.randint(-8, 8, (N, K), generator=g), 4),
        "weight_scale": (torch.rand(K // 64, N, generator=g) * 0.01 + 0.005).bfloat16(),
        "smooth_factor": (torch.rand(K, generator=g) + 0.5).bfloat16(),
        "proj_down": half(K, rank, by=0.1),
        "proj_up": half(N, rank, by=0.1),
    }


def svdquant_forward(t, x, bias, unsigned):
    """Of a QuantizedTensor, in fp32."""
    f = {k: v if k == "weight" else v.float() for k, v in t.items()}
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=f["weight_scale"], orig_dtype=torch.float32, orig_shape=(N, K), proj_down=f["proj_down"], proj_up=f["proj_up"],
        smooth_factor=f["smooth_factor"], act_unsigned=unsigned,
    )  # fmt: skip
    return torch.nn.functional.linear(
        x, QuantizedTensor(t["weight"], "TensorCoreSVDQuantW4A4Layout", params), bias.float()
    )


def tiles(t):
    """kitchen_tile_packed_w4a4 of natural tensors: (N/128, K/64, 32, 128), (N/128, K/64, 128) and (N/128, R,
    128)."""
    w = (
        t["weight"]
        .view(N // 128, 32, 4, K // 64, 32)
        .permute(0, 3, 1, 2, 4)
        .reshape(N // 128, K // 64, 32, 128)
    )
    scale = t["weight_scale"].view(K // 64, N // 128, 128).transpose(0, 1)
    return t | {
        "weight": w,
        "weight_scale": scale,
        "proj_up": t["proj_up"].view(N // 128, 128, -1).transpose(1, 2),
    }


KITCHEN = {leaf: f"weight_{leaf}" for leaf in ("proj_down", "proj_up", "smooth_factor")}


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
    assert "float8 layers (1) are read as bf16" in opened.notes[0]


# -- names and shapes


@pytest.fixture(scope="module")
def int8():
    return QuantizedTensor.from_float(weight(), "TensorWiseINT8Layout", per_channel=True).state_dict("weight")


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


# -- what is refused

INT8 = {"format": "int8_tensorwise"}
CONVROT = {"format": "convrot_w4a4"}


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        (torch.zeros(40), r"img_mlp\.2\.comfy_quant: expected JSON as a row of uint8, found F32 \(40,\)"),
        (torch.zeros(4, 10, dtype=torch.uint8), r"expected JSON as a row of uint8, found U8 \(4, 10\)"),
        (torch.zeros(4097, dtype=torch.uint8), "at most 4096 bytes, found 4097"),
        (torch.zeros(0, dtype=torch.uint8), "at most 4096 bytes, found 0"),
        (torch.full((9,), 200, dtype=torch.uint8), "not JSON"),
        ("[" * 4000, "not JSON"),
        ("[1]", "expected an object, found list"),
        ({"format": "int3"}, "unknown format 'int3'; known are svdquant_w4a4"),
        ({"format": ["int8_tensorwise"]}, "unknown format"),
        ({}, "unknown format 'None'"),
        ({"format": "nvfp4"}, "nvfp4 is one of ComfyUI's own.*load it with Load Diffusion Model"),
        ({"format": "mxfp8"}, "mxfp8 is one of ComfyUI's own.*load it with Load Diffusion Model"),
        (
            {"format": "asym_w4a8_int8"},
            "asym_w4a8_int8 is one of ComfyUI's own.*load it with Load Diffusion Model",
        ),
        (CONVROT | {"convrot_groupsize": 128}, "convrot_groupsize: expected 16, 64 or 256, found 128"),
        (CONVROT | {"convrot_groupsize": None}, "convrot_groupsize: expected int, found 'None'"),
        (CONVROT | {"convrot_groupsize": "wide"}, "convrot_groupsize: expected int, found 'wide'"),
        (CONVROT | {"convrot_groupsize": [256]}, r"convrot_groupsize: expected int, found '\[256\]'"),
        (CONVROT | {"convrot_groupsize": float("inf")}, "convrot_groupsize: expected int, found 'inf'"),
        (
            CONVROT | {"convrot_groupsize": -256},
            "convrot_groupsize: expected 16, 64 or 256, found -256, no power of 4",
        ),
        (
            INT8 | {"convrot": True, "convrot_groupsize": True},
            "convrot_groupsize: expected 16, 64 or 256, found 1, no power of 4",
        ),
        (CONVROT | {"linear_dtype": None}, "linear_dtype: expected int4 or int8, found 'None'"),
        (CONVROT | {"linear_dtype": "fp8"}, "linear_dtype: expected int4 or int8, found 'fp8'"),
        ({"format": "awq_w4a16", "group_size": 128}, "group_size: expected 64, found 128"),
        (
            {"format": "svdquant_w4a4", "lowrank_branch_input_basis": "post_smoothing"},
            "acts on the smoothed input, expected 'raw'",
        ),
    ],
)
def test_bad_declarations(write, int8, conf, said):
    path = write(int8, conf)
    with pytest.raises(CheckpointError, match=said) as caught:
        KitchenFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("not json", "not JSON"),
        ("[]", "expected an object with 'layers'"),
        ('{"layers": []}', "expected an object with 'layers'"),
        ({NAME: "int8_tensorwise"}, f"layer {NAME}: expected an object, found str"),
        (
            {"double_blocks.7.img_mlp.0": INT8},
            r"declares the layer double_blocks\.7\.img_mlp\.0 as int8_tensorwise, but the tensor",
        ),
        (
            {NAME: INT8 | {"convrot": True}},
            "comfy_quant says 'int8_tensorwise, no rotation, 8-bit x', the header.*says 'int8_tensorwise, "
            "rotation 256",
        ),
    ],
)
def test_bad_headers(write, int8, header, said):
    with pytest.raises(CheckpointError, match=said):
        KitchenFile(write(int8, INT8, header))


def without(tensors, leaf):
    return {k: v for k, v in tensors.items() if k != leaf}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: without(t, "weight_scale"), "int8_tensorwise asks for weight_scale, which is missing"),
        (lambda t: without(t, "weight"), "int8_tensorwise asks for weight, which is missing"),
        (
            lambda t: t | {"weight": t["weight"].float()},
            r"img_mlp\.2\.weight: expected the dtype I8, found F32",
        ),
        (lambda t: t | {"weight": t["weight"].view(2, -1, K)}, "expected 2 dimensions, found the shape"),
        (lambda t: t | {"weight": t["weight"][:, :200]}, "expected in-channels in groups of 16, found 200"),
        (
            lambda t: t | {"weight_scale": t["weight_scale"].int()},
            "weight_scale: expected the dtype F16 or BF16 or F32, found I32",
        ),
        (
            lambda t: t | {"weight_scale": t["weight_scale"][:7]},
            r"weight_scale: expected the shape \(256,\) or \(256, 1\).*found \(7, 1\)",
        ),
        (lambda t: t | {"bias": torch.zeros(7)}, r"bias: expected the shape \(256,\), found \(7,\)"),
        (
            lambda t: t | {"pre_quant_scale": torch.ones(K)},
            "pre_quant_scale is no tensor of int8_tensorwise and may change",
        ),
    ],
)
def test_bad_tensors(write, int8, change, said):
    with pytest.raises(CheckpointError, match=said):
        KitchenFile(write(change(int8), INT8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: without(t, "proj_up"), "asks for weight_proj_up or proj_up, which is missing"),
        (lambda t: t | {"weight_proj_up": t["proj_up"].clone()}, "found both weight_proj_up and proj_up"),
        (lambda t: t | {"proj_up": t["proj_up"][:, :3]}, r"proj_up: expected the shape \(256, 16\)"),
        (lambda t: t | {"proj_down": t["proj_down"][:64]}, r"proj_down: expected the shape \(1024, 16\)"),
        (
            lambda t: t | {"weight_scale": t["weight_scale"].T},
            r"weight_scale: expected the shape \(16, 256\)",
        ),
        (
            lambda t: t | {"weight_scale": t["weight_scale"].float()},
            "weight_scale: expected the dtype F16 or BF16, found F32",
        ),
        (
            lambda t: t | {"smooth_factor": t["smooth_factor"][:8]},
            r"smooth_factor: expected the shape \(1024,\)",
        ),
        (
            lambda t: t | {"weight": t["weight"].view(2, 16, 64, 64)},
            r"weight: expected the shape \(2, 16, 32, 128\)",
        ),
    ],
)
def test_bad_svdquant_tensors(write, change, said):
    with pytest.raises(CheckpointError, match=said):
        KitchenFile(write(change(svdquant(False)), {"format": "svdquant_w4a4"}))


def test_awq_of_absurd_width(write):
    """128 KiB of codes must not ask for gigabytes of group indicators."""
    tensors = {"weight": torch.zeros(2, 2**16, dtype=torch.int8), "bias": torch.zeros(2)}
    tensors |= {k: torch.zeros(2**11, 2) for k in ("weight_scale", "weight_zeros")}
    with pytest.raises(CheckpointError, match="at most 65536 in-channels, found 131072"):
        KitchenFile(write(tensors, {"format": "awq_w4a16"}))


def test_nothing_that_this_pack_runs(write):
    fp8 = {"weight": weight().to(torch.float8_e4m3fn), "weight_scale": torch.ones(())}
    with pytest.raises(
        CheckpointError, match=r"no layer .* \(found: 1 float8_e4m3fn\)\. Load it with Load Diffusion Model"
    ):
        KitchenFile(write(fp8, {"format": "float8_e4m3fn"}))
    with pytest.raises(
        CheckpointError,
        match=r"weight_scale: expected the shape \(\) or \(1,\) or \(256, 1\), found \(256,\)",
    ):
        KitchenFile(write(fp8 | {"weight_scale": torch.ones(N)}, {"format": "float8_e4m3fn"}))


def test_diffusers_names_are_refused(tmp_path):
    tensors = {k: torch.zeros(64, 64, dtype=torch.bfloat16) for k in FLUX.diffusers_signature}
    tensors["transformer_blocks.0.attn.add_q_proj.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    tensors["transformer_blocks.0.attn.add_q_proj.weight_scale"] = torch.ones(64, 1)
    tensors["transformer_blocks.0.attn.add_q_proj.comfy_quant"] = marker(INT8)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="diffusers' names, expected ComfyUI's for FLUX"):
        KitchenFile(tmp_path / "m.safetensors")
