"""Files in comfy-kitchen's formats that are not sound: each is refused with what was expected and found."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.kitchen import INT8, NAME, K, N, marker, svdquant, weight

pytestmark = pytest.mark.quick


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
        CheckpointError,
        match=r"no layer .* \(found: 1 float8_e4m3fn\) \(.*floats\)\. Load it with Load Diffusion Model",
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
