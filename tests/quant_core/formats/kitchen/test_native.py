"""The export for stock ComfyUI: which layers it takes, and that no byte of them changes."""

import json
import re
from dataclasses import replace

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreConvRotW4A4Layout, TensorWiseINT8Layout
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_nibble.kernels.operator.codes import four_bits
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.quant_core.formats import nibble
from comfyui_nibble.quant_core.formats.kitchen import native, nvfp4
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile
from comfyui_nibble.quant_core.layer.precisions import w4a8, w8a8
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state

pytestmark = pytest.mark.quick

SHAPES = flux_shapes(1, 0, 256, 64, 64)
NAMES = ("double_blocks.0.img_attn.proj", "double_blocks.0.txt_attn.proj", "double_blocks.0.img_mlp.2")
METADATA = {
    "provenance": {"method": "convrot", "nibble": "0"},
    "report": [Row(NAMES[0], "double_blocks.0", 64, 64, "16 bit").to_json()],
}


@pytest.fixture
def layers(make_problem):
    """convrot at 4 bits, the same with 8-bit activations, and at 8 bits on both sides."""
    convrot, out = METHODS["convrot"], {}
    for name in NAMES:
        n, k = SHAPES[f"{name}.weight"]
        problem = make_problem(n, k, fit_tokens=256)
        layer = convrot.fit(problem, convrot.config).layer
        out[name] = {NAMES[1]: w4a8, NAMES[2]: lambda layer, problem=problem: w8a8(problem, layer)}.get(
            name, lambda layer: layer
        )(layer)
    return {name: replace(layer, name=name) for name, layer in out.items()}


@pytest.fixture
def rest():
    return {k: t for k, t in random_state(SHAPES).items() if k.rpartition(".")[0] not in NAMES}


def test_from_the_packs_own_file_and_back_no_byte_changes(layers, rest, tmp_path):
    nibble.save(tmp_path / "own", layers, rest, "flux", METADATA["provenance"], METADATA["report"])
    own = nibble.PackFile(tmp_path / "own")
    native.save(
        tmp_path / "a", {n: own.layer(n) for n in own.specs}, {k: own.tensor(k) for k in own.rest}, METADATA
    )
    opened = KitchenFile(tmp_path / "a")
    assert opened.specs == own.specs
    assert opened.family == "flux"
    assert (opened.provenance, opened.report) == (METADATA["provenance"], METADATA["report"])
    for name, layer in layers.items():
        for key, tensor in opened.layer(name).tensors.items():
            assert torch.equal(tensor, layer.tensors[key]), (name, key)
            assert tensor.dtype == layer.tensors[key].dtype
    native.save(
        tmp_path / "b",
        {n: opened.layer(n) for n in opened.specs},
        {k: opened.tensor(k) for k in opened.rest},
        METADATA,
    )
    before, after = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert safe_open(tmp_path / "a", "pt").metadata() == safe_open(tmp_path / "b", "pt").metadata()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "own"]


def test_both_declarations_say_the_same_in_comfyuis_words(layers, rest, tmp_path):
    native.save(tmp_path / "a", layers, rest, METADATA)
    tensors = load_file(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as f:
        header = json.loads(f.metadata()["_quantization_metadata"])["layers"]
        export = json.loads(f.metadata()["nibble_export"])
    in_tensors = {
        k.removesuffix(".comfy_quant"): json.loads(bytes(t.tolist()))
        for k, t in tensors.items()
        if k.endswith(".comfy_quant")
    }
    assert header == in_tensors
    assert header == {
        NAMES[0]: {"format": "convrot_w4a4", "convrot_groupsize": 256},
        NAMES[1]: {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int8"},
        NAMES[2]: {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    }
    assert export == {"version": 1} | METADATA


def test_comfy_kitchens_tensors_take_them(layers, rest, tmp_path):
    """The very constructor that ComfyUI calls."""
    native.save(tmp_path / "a", layers, rest, METADATA)
    tensors = load_file(tmp_path / "a")
    for name, layout, extra in (
        (NAMES[0], TensorCoreConvRotW4A4Layout, {}),
        (NAMES[2], TensorWiseINT8Layout, {"convrot": True}),
    ):
        params = layout.Params(
            scale=tensors[f"{name}.weight_scale"],
            orig_dtype=torch.float32,
            orig_shape=SHAPES[f"{name}.weight"],
            **extra,
        )
        made = QuantizedTensor(tensors[f"{name}.weight"], layout.__name__, params)
        torch.testing.assert_close(made.dequantize(), layers[name].dequantize(), rtol=1e-5, atol=1e-6)


def spec(weight, activation, rotation=256, **more):
    return LinearSpec(512, 64, (PartSpec(0, 512, weight, activation, rotation=rotation, **more),))


ROW4, ROW8, TOKEN4, TOKEN8 = (
    WeightSpec(4, "channel"),
    WeightSpec(8, "channel"),
    ActivationSpec(4, "token"),
    ActivationSpec(8, "token"),
)


@pytest.mark.parametrize(
    ("made", "want"),
    [
        (spec(ROW4, TOKEN4, 16), "convrot_w4a4"),
        (spec(ROW4, TOKEN8, 64), "convrot_w4a4"),
        (spec(ROW4, None), "convrot_w4a4"),
        (spec(ROW8, TOKEN8, 0), "int8_tensorwise"),
        (spec(ROW8, None), "int8_tensorwise"),
        (spec(WeightSpec(8, "tensor"), TOKEN8, 0), "int8_tensorwise"),
        (spec(nvfp4.WEIGHT, nvfp4.ACTIVATION, 0), "nvfp4"),
        (spec(nvfp4.WEIGHT, replace(nvfp4.ACTIVATION, fixed=0.1), 0), "nvfp4"),
        (spec(nvfp4.WEIGHT, None, 0), "nvfp4"),
    ],
)
def test_what_stock_comfyui_runs(made, want):
    assert native.format_of(made) == (want, "")
    assert native.losses({"a": made}) == {}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (spec(ROW4, TOKEN4, 0), "no rotation; convrot_w4a4 takes 16, 64 or 256"),
        (spec(ROW4, TOKEN4, 128), "a rotation of 128 channels; convrot_w4a4 takes"),
        (spec(ROW8, TOKEN8, 4), "a rotation of 4 channels; int8_tensorwise takes"),
        (
            spec(ROW4, replace(TOKEN4, clip=0.9)),
            "4-bit signed activations per token clipped at 0.9 of absmax; ComfyUI has 4-bit",
        ),
        (spec(ROW8, TOKEN4), "4-bit signed activations per token; ComfyUI has 8-bit"),
        (spec(ROW8, replace(TOKEN8, shift=0.17), 0), "shifted by 0.17; ComfyUI has 8-bit"),
        (spec(ROW4, ActivationSpec()), "activations per group"),
        (spec(WeightSpec(4, "tensor"), TOKEN4), "4-bit weights with a scale a tensor; ComfyUI has one a row"),
        (spec(WeightSpec(8, "group"), TOKEN8), "8-bit weights with a scale a group"),
        (spec(WeightSpec(2, "channel"), TOKEN4), "weights of 2 bits"),
        (spec(ROW4, TOKEN4, 0, kronecker=(16, 32)), "a learned transform"),
        (spec(ROW4, TOKEN4, rank=16), "a low rank or smoothing with weights of 4 bits per channel"),
        (
            spec(WeightSpec(), ActivationSpec(), 0),
            r"groups or a low rank \(svdquant_w4a4\), which ComfyUI's own loader does not read",
        ),
        (replace(spec(ROW4, TOKEN4), order=True), "an order of in-channels"),
        (
            spec(nvfp4.WEIGHT, replace(nvfp4.ACTIVATION, outer="token"), 0),
            "activations with scales of tokens",
        ),
        (
            spec(nvfp4.WEIGHT, four_bits("nvfp4")[1], 0),
            "or either of two a group; ComfyUI's have one a tensor",
        ),
        (spec(nvfp4.WEIGHT, TOKEN8, 0), "scales of tokens or either"),
        (spec(ROW4, nvfp4.ACTIVATION, 0), "4-bit floating-point activations .* and integer weights"),
        (spec(nvfp4.WEIGHT, nvfp4.ACTIVATION, 64), "ComfyUI's nvfp4 has none"),
        (spec(nvfp4.WEIGHT, nvfp4.ACTIVATION, 0, smooth=True), "ComfyUI's nvfp4 has none"),
        (replace(spec(nvfp4.WEIGHT, nvfp4.ACTIVATION, 0), out_features=40), "a multiple of 16"),
        (
            LinearSpec(512, 64, (PartSpec(0, 256, ROW4, TOKEN4), PartSpec(256, 512, ROW4, TOKEN4))),
            "2 ranges of in-channels",
        ),
    ],
)
def test_what_it_does_not_run(made, reason):
    found, why = native.format_of(made)
    assert found == ""
    assert re.search(reason, why)
    assert native.losses({"a": made}) == {"a": f"has {why}"}


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", False),  # SDXL's context width
        ("transformer_blocks.0.attn2.to_k", False),  # LTX-Video's
        ("input_blocks.4.1.transformer_blocks.1.attn2.to_k", True),
        ("transformer_blocks.0.attn2.to_v", True),
        ("blocks.0.norm1.linear", False),
    ],
)
def test_widths_that_comfyui_reads_are_not_packed(name, packed):
    assert native.format_of(spec(ROW4, TOKEN4), name)[0] == ("convrot_w4a4" if packed else "")
    assert (name in native.losses({name: spec(ROW4, TOKEN4)})) == (not packed)
    assert native.losses({name: spec(ROW8, TOKEN8)}) == {}
    assert (name in native.losses({name: spec(nvfp4.WEIGHT, nvfp4.ACTIVATION, 0)})) == (not packed)


def test_a_layer_that_is_not_native_is_not_written(layers, rest, make_problem, tmp_path):
    other = METHODS["svdquant"].fit(make_problem(64, 256, calibrated=False), METHODS["svdquant"].config).layer
    with pytest.raises(
        ValueError,
        match=r"layer blocks\.9 has smoothing, groups or a low rank.*8 or 16 bit, or quantize the model with "
        r"the method native",
    ):
        native.save(tmp_path / "a", layers | {"blocks.9": other}, rest, METADATA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "is not JSON"),
        ('{"report": 1}', "report: expected a list, found 1"),
        ('{"report": [{"name": "x"}]}', "layer x: block: expected text, found none"),
        ('{"provenance": []}', "provenance: expected an object, found list of 0"),
    ],
)
def test_a_damaged_record_of_the_export_names_the_file_and_the_field(layers, rest, tmp_path, entry, message):
    native.save(tmp_path / "m.safetensors", layers, rest, METADATA)
    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "m.safetensors", metadata=metadata | {"nibble_export": entry})
    with pytest.raises(CheckpointError, match=f"m.safetensors: header entry 'nibble_export': {message}"):
        KitchenFile(tmp_path / "m.safetensors")
