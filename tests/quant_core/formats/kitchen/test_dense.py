"""Layers that are read as 16-bit weights: their values are comfy-kitchen's, unsound ones are named."""

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.detect import FULL, KITCHEN, kind_of, open_quantized
from comfyui_nibble.quant_core.formats.kitchen import dense
from comfyui_nibble.quant_core.formats.kitchen.declared import Declaration, DeclarationError, parse
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.kitchen import NAME, SHAPES, K, N, weight, written
from comfyui_nibble.tests.assets.synthetic import random_state

pytestmark = pytest.mark.quick

LAYOUTS = {
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "asym_w4a8_int8": "AsymW4A8Int8Layout",
}
ERROR = {"nvfp4": 0.11, "mxfp8": 0.03, "asym_w4a8_int8": 0.08}  # of a normal weight, relative


@pytest.fixture(scope="module")
def state():
    return random_state(SHAPES)


def made(kind, **options):
    """comfy-kitchen's tensor of the test's weight."""
    return QuantizedTensor.from_float(weight(), LAYOUTS[kind], **options)


def conf(kind, **options):
    sizes = {"group_size": 16, "convrot_groupsize": 256} if kind.startswith("asym") else {}
    return {"format": kind} | sizes | options


@pytest.mark.parametrize("kind", LAYOUTS)
def test_values_are_comfy_kitchens(kind):
    """In fp32; and in bf16 the nearest to those."""
    held = made(kind)
    parts = held.state_dict("weight")
    found = dense._in_fp32(parse(conf(kind)), parts.get)
    want = held.dequantize()
    assert want.dtype == torch.float32
    assert float((found - want).norm() / want.norm()) < 1e-6
    assert 0.01 < float((found - weight()).norm() / weight().norm()) < ERROR[kind]
    assert torch.equal(dense.weight_of(parse(conf(kind)), parts.get), found.bfloat16())


@pytest.mark.parametrize("options", [{"symmetric": False, "codebook": False}, {"codebook": False}])
def test_forms_of_asym_w4a8(options):
    held = made("asym_w4a8_int8", **options)
    parts = held.state_dict("weight")
    assert ("weight_correction" in parts) == ("symmetric" in options)
    found = dense._in_fp32(parse(conf("asym_w4a8_int8")), parts.get)
    assert float((found - held.dequantize()).norm() / found.norm()) < 1e-6


def test_smoothing_in_front_of_nvfp4_is_part_of_the_weight():
    parts = made("nvfp4").state_dict("weight")
    smooth = torch.rand(K) + 0.5
    found = dense._in_fp32(Declaration("nvfp4"), (parts | {"pre_quant_scale": smooth}).get)
    torch.testing.assert_close(found, dense._in_fp32(Declaration("nvfp4"), parts.get) * smooth)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("where", ["tensor", "header", "header with a prefix"])
def test_a_file_of_them_is_a_source(tmp_path, state, kind, where):
    parts = made(kind).state_dict("weight")
    prefix = "model.diffusion_model." if "prefix" in where else ""
    said = {"conf": conf(kind)} if where == "tensor" else {"header": {f"{prefix}{NAME}": conf(kind)}}
    path = written(tmp_path / "m.safetensors", state, parts, **said, prefix=prefix)
    assert kind_of(path) == (FULL if kind == "mxfp8" else KITCHEN)  # those that run can be a source, too
    checkpoint = Checkpoint(path)
    assert checkpoint.reduced == f"1 weights in {kind}"
    assert checkpoint.shapes == {key: tuple(t.shape) for key, t in state.items()}
    assert torch.equal(checkpoint.get(f"{NAME}.weight"), dense.weight_of(parse(conf(kind)), parts.get))
    assert torch.equal(checkpoint.get(f"{NAME}.bias"), state[f"{NAME}.bias"])
    beside = {"nvfp4": K // 16 + 4 / N, "mxfp8": K // 32, "asym_w4a8_int8": K // 16 + 4 + 64 / N}[kind]
    assert checkpoint.saved == N * (2 * K - K // (1 if kind == "mxfp8" else 2) - beside)


def test_beside_layers_that_run_they_are_read_as_bf16(tmp_path, state):
    """A file that mixes them with int8 layers is a quantized model."""
    other = "double_blocks.0.img_mlp.0"
    eight = QuantizedTensor.from_float(state[f"{other}.weight"].float(), "TensorWiseINT8Layout")
    mixed = {k: t for k, t in state.items() if k != f"{other}.weight"} | eight.state_dict(f"{other}.weight")
    parts = made("mxfp8").state_dict("weight")
    header = {NAME: conf("mxfp8"), other: {"format": "int8_tensorwise"}}
    path = written(tmp_path / "m.safetensors", mixed, parts, header=header)
    assert kind_of(path) == KITCHEN
    model = open_quantized(path)
    assert list(model.specs) == [other]
    assert "mxfp8 layers (1) are read as bf16" in model.notes[0]
    assert "this pack has no products of 8-bit floats): they take twice the memory" in model.notes[0]
    assert model.shape(f"{NAME}.weight") == (N, K)
    assert torch.equal(model.tensor(f"{NAME}.weight"), dense.weight_of(parse(conf("mxfp8")), parts.get))


def test_what_does_not_run_says_why(tmp_path, state):
    path = written(tmp_path / "m.safetensors", state, made("mxfp8").state_dict("weight"), conf("mxfp8"))
    with pytest.raises(CheckpointError, match=r"1 mxfp8\) \(.* no products of 8-bit floats\)\. Load it with"):
        KitchenFile(path)
    assert open_quantized(path).specs[NAME].describe() == "W8A8 per channel H256"  # rounded to int8


@pytest.mark.parametrize(
    ("kind", "leaf", "tensor", "said"),
    [
        ("nvfp4", "weight_scale_2", None, "nvfp4 asks for weight_scale_2, which is missing"),
        ("nvfp4", "weight_scale", torch.ones(N, K // 16), r"weight_scale: expected the dtype F8_E4M3 or U8"),
        ("nvfp4", "weight_scale_2", torch.ones(N), r"weight_scale_2: expected the shape \(\) or \(1,\)"),
        ("nvfp4", "input_scale", torch.ones(2), r"input_scale: expected the shape \(\) or \(1,\), found"),
        ("nvfp4", "pre_quant_scale", torch.ones(N), rf"pre_quant_scale: expected the shape \({K},\), found"),
        ("nvfp4", "input_global_scale", torch.ones(1), "input_global_scale is no tensor of nvfp4"),
        ("mxfp8", "weight_scale", torch.ones(N, K // 32, dtype=torch.uint8)[:8], "expected the shape"),
        ("mxfp8", "weight", weight().bfloat16(), "expected the dtype F8_E4M3 or U8, found BF16"),
        (
            "asym_w4a8_int8",
            "weight_s_rel",
            torch.ones(N, 4),
            r"or 48 bytes a row.* the 64 in-channels of .*weight_s_rel",
        ),
        ("asym_w4a8_int8", "weight_codebook", torch.ones(64), r"expected the shape \(16,\), found \(64,\)"),
    ],
)
def test_unsound_layers_are_named(tmp_path, state, kind, leaf, tensor, said):
    parts = made(kind).state_dict("weight") | {leaf: tensor}
    parts = {key: t for key, t in parts.items() if t is not None}
    path = written(tmp_path / "m.safetensors", state, parts, conf(kind))
    with pytest.raises(CheckpointError, match=f"m.safetensors: layer {NAME}: .*{said}"):
        Checkpoint(path)


@pytest.mark.parametrize("group", [3, 6, 24, "many"])
def test_sizes_of_groups(group):
    with pytest.raises(DeclarationError, match="group_size: expected"):
        parse(conf("asym_w4a8_int8", group_size=group))
