"""nunchaku's files that are not sound, and what is refused of them."""

import json

import pytest
import torch

from comfyui_nibble.quant_core.formats.nunchaku.read import NunchakuFile
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets import nunchaku as made
from comfyui_nibble.tests.assets.nunchaku import D, S, write


def header(**weight):
    return {"quantization_config": json.dumps({"weight": {"dtype": "int4", "group_size": 64} | weight})}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (header(dtype="int3"), "expected 'int4' or 'fp4_e2m1_all', found 'int3'"),
        (header(group_size=32), "expected 64 with 'int4', found 32"),
        ({"quantization_config": '{"weight": 3}'}, "expected an object, found 3"),
        ({"quantization_config": "{"}, "'quantization_config' is not JSON"),
        ({"quantization_config": "[" * 200000}, "is not JSON"),
        ({"quantization_config": "[]"}, "expected an object, found list"),
        (
            {"quantization_config": " " * (1 << 20) + "{}"},
            "expected at most 1048576 characters, found 1048578",
        ),
        ({"provenance": "nothing"}, "'provenance' is not JSON"),
    ],
)
def test_headers_are_not_trusted(metadata, message, model, tmp_path):
    path = write(tmp_path, model.file, metadata)
    with pytest.raises(CheckpointError, match=message) as error:
        NunchakuFile(path)
    assert str(path) in str(error.value)


Q = f"{D}attn.to_qkv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop(f"{Q}.wscales"), rf"{Q} is a quantized layer, but its tensor wscales is missing"),
        (lambda f: f.pop(f"{Q}.smooth_factor"), "its tensor smooth_factor is missing"),
        (lambda f: f.pop(f"{Q}.qweight"), "its tensor qweight is missing"),
        (lambda f: f.pop(f"{D}norm1.linear.wzeros"), "its tensor wzeros is missing"),
        (lambda f: f.pop(f"{Q}.proj_up"), f"{Q}.proj_down: expected proj_up beside proj_down, found none"),
        (
            lambda f: f.update({f"{Q}.wscales": f[f"{Q}.wscales"].float()}),
            f"{Q}.wscales: expected the dtype BF16 or F16, found F32",
        ),
        (
            lambda f: f.update({f"{Q}.wscales": f[f"{Q}.wscales"].to(torch.float8_e4m3fn)}),
            f"dtype is 'int4', but {Q}.wscales is F8_E4M3, as only files of 'fp4_e2m1_all' have it",
        ),
        (
            lambda f: f.update({f"{Q}.wcscales": f[f"{Q}.bias"]}),
            f"dtype is 'int4', but it has {Q}.wcscales, as only files of 'fp4_e2m1_all' have it",
        ),
        (
            lambda f: f.update({f"{Q}.wscales": f[f"{Q}.wscales"].T.contiguous()}),
            r"wscales: expected the shape \(2, 384\).*found \(384, 2\)",
        ),
        (
            lambda f: f.update({f"{Q}.qweight": f[f"{Q}.qweight"].to(torch.int32)}),
            "qweight: expected the dtype I8, found I32",
        ),
        (
            lambda f: f.update({f"{Q}.qweight": f[f"{Q}.qweight"][:100]}),
            "qweight: expected rows of 3 layers of one size, found 100",
        ),
        (
            lambda f: f.update({f"{Q}.qweight": f[f"{Q}.qweight"][:99]}),
            "multiples of 128 out- and 128 in-channels, found 99 and 128",
        ),
        (
            lambda f: f.update({f"{Q}.qweight": f[f"{Q}.qweight"].flatten()}),
            "qweight: expected two dimensions",
        ),
        (lambda f: f.update({f"{Q}.bias": f[f"{Q}.bias"][:-1]}), r"bias: expected the shape \(384,\)"),
        (
            lambda f: f.update({f"{Q}.proj_down": f[f"{Q}.proj_down"][:, :8]}),
            "proj_down: expected a rank that is a multiple of 16, found 8",
        ),
        (
            lambda f: f.update({f"{Q}.proj_up": f[f"{Q}.proj_up"][:, :0]}),
            r"proj_up: expected the shape \(384, 16\)",
        ),
        (
            lambda f: f.update({f"{D}norm1.linear.proj_down": torch.ones(2, 2)}),
            "expected a modulation layer without a low-rank branch, found one",
        ),
        (
            lambda f: f.update({"proj_out.qweight": f[f"{Q}.qweight"]}),
            "proj_out.qweight: nunchaku has no quantized layer of this name in FLUX.1",
        ),
        (
            lambda f: [f.pop(k) for k in list(f) if k.startswith(f"{S}mlp_fc2.")],
            rf"expected {S}mlp_fc2.qweight, found none: a part of",
        ),
        (
            lambda f: [f.pop(k) for k in list(f) if k.startswith(f"{S}mlp_fc1.")],
            rf"expected {S}mlp_fc1.qweight, found none: a part of",
        ),
        (
            lambda f: [f.pop(k) for k in list(f) if k.startswith(f"{S}attn.to_qkv.")],
            rf"expected {S}qkv_proj.qweight, found none: a part of",
        ),
        (lambda f: f.pop(f"{D}attn.norm_q.weight"), rf"expected {D}norm_q.weight, found none"),
        (lambda f: f.pop("x_embedder.weight"), "not a whole FLUX.1 model: expected x_embedder.weight"),
        (
            lambda f: f.update({f"{D}qkv_proj.qweight": f[f"{Q}.qweight"]}),
            f"two versions of nunchaku.*{D}qkv_proj.qweight and .*attn",
        ),
        (
            lambda f: f.update({f"{D}ff.net.2.lora_up": f.pop(f"{D}ff.net.2.proj_up")}),
            "names of two versions of nunchaku.*lora_up and",
        ),
        (
            lambda f: f.update(
                {
                    f"transformer_blocks.2{k.removeprefix('transformer_blocks.0')}": t
                    for k, t in list(f.items())
                    if k.startswith(D)
                }
            ),
            "expected the blocks transformer_blocks.0 to transformer_blocks.2, found none of "
            "transformer_blocks.1",
        ),
        (
            lambda f: f.update(
                {
                    f"transformer_blocks.99999.{k.removeprefix(D)}": t
                    for k, t in list(f.items())
                    if k.startswith(Q)
                }
            ),
            "no quantized layer of this name",
        ),
    ],
)
def test_contradictions_are_named(change, message, model, tmp_path):
    file = dict(model.file)
    change(file)
    path = write(tmp_path, file)
    with pytest.raises(CheckpointError, match=message) as error:
        NunchakuFile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("model", "key", "change", "message"),
    [
        (
            made.flux,
            "norm_out.linear.bias",
            lambda t: t[:-1],
            r"norm_out\.linear\.bias: expected two halves of rows, found \(255,\)",
        ),
        (
            made.z_image,
            "noise_refiner.0.attention.to_q.weight",
            torch.flatten,
            r"to_q\.weight: expected rows that noise_refiner\.0\.attention\.to_k",
        ),
    ],
)
def test_rest_that_cannot_be_put_together(model, key, change, message, tmp_path):
    file = model().file
    with pytest.raises(CheckpointError, match=message):
        NunchakuFile(write(tmp_path, file | {key: change(file[key])}))


def test_half_of_the_older_folder(model, tmp_path):
    write(tmp_path, made.old_names(model.file), None, "transformer_blocks.safetensors")
    for path in (tmp_path, tmp_path / "transformer_blocks.safetensors"):
        with pytest.raises(CheckpointError, match=r"expected unquantized_layers\.safetensors, found none"):
            NunchakuFile(path)


def test_another_model(model, tmp_path):
    file = {
        k.replace("transformer_blocks", "sana_blocks"): t for k, t in model.file.items() if "single" not in k
    }
    with pytest.raises(
        CheckpointError, match=r"of no model that can be read here \(FLUX\.1, Qwen-Image, SDXL, Z-Image\)"
    ):
        NunchakuFile(write(tmp_path, file))


def test_a_tensor_too_many_is_noted(model, tmp_path):
    opened = NunchakuFile(write(tmp_path, model.file | {"extra.weight": torch.ones(2)}))
    assert opened.notes == ("1 tensors that the model does not have are left out: extra.weight",)
