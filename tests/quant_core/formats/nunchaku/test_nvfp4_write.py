"""Writing NVFP4 models as nunchaku's files, and what is said of those that cannot be."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from comfyui_nibble.kernels.operator.codes import four_bits
from comfyui_nibble.kernels.operator.spec import SpecError
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.nunchaku.read import NunchakuFile
from comfyui_nibble.quant_core.formats.nunchaku.targets import losses
from comfyui_nibble.quant_core.formats.nunchaku.write import reads_back, save
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer, same_bits
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.assets import nunchaku as made
from comfyui_nibble.tests.assets.nunchaku import FP4, write

QKV, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"


@pytest.fixture(scope="module")
def ours(tiny_state):
    """The small FLUX by SVDQuant of rank 16 on the nvfp4 grid without data: ({name: layer}, {key: tensor} of
    the rest)."""
    shapes, method = {k: tuple(v.shape) for k, v in tiny_state.items()}, by_name("svdquant")
    config = method.configured(rank=16, gptq=False, iterations=0, grid="nvfp4")
    found = quantize_layers(FLUX.layers(shapes), Tensors(tiny_state), method, config)
    layers = {layer.name: layer for layer, _ in found}
    return layers, {k: v for k, v in tiny_state.items() if k.rpartition(".")[0] not in layers}


def with_outer(layer, outer):
    tensors = layer.tensors | {"outer_scale": outer.expand(1, layer.spec.out_features).contiguous()}
    return QuantizedLayer(layer.name, layer.spec, tensors)


def of_file(opened):
    layers = {name: opened.layer(name) for name in opened.specs}
    return layers, {k: opened.tensor(k) for k in opened.rest}


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("flux", lambda: made.flux(double=2, single=2, fp4=True)),
        ("qwen_image", lambda: made.qwen_image(fp4=True)),
        ("z_image", lambda: made.z_image(fp4=True)),
    ],
)
def test_files_go_there_and_back_to_the_same_bytes(family, model, tmp_path):
    file = made.old_names(model().file) if family == "flux" else model().file
    layers, rest = of_file(NunchakuFile(write(tmp_path, file, FP4)))
    assert losses({name: layer.spec for name, layer in layers.items()}, family) == {}
    assert save(tmp_path / "again.safetensors", layers, rest, family, {}) == []
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(file)
    assert [k for k, t in file.items() if not same_bits(again[k], t)] == []


def test_the_header(ours, tmp_path):
    """What nunchaku's `merge_safetensors` writes and `get_precision_from_quantization_config` asks for."""
    save(tmp_path / "ours.safetensors", *ours, "flux", {})
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["quantization_config"]) == {
        "method": "svdquant",
        "weight": {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16},
        "activation": {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16},
        "rank": 16,
    }
    assert metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    assert json.loads(metadata["comfy_config"])["model_class"] == "FluxSchnell"


def test_a_model_of_ours(ours, tmp_path):
    layers, rest = ours
    assert losses({name: layer.spec for name, layer in layers.items()}, "flux") == {}
    (note,) = save(tmp_path / "ours.safetensors", layers, rest, "flux", {})
    # Four modulation layers with 1 added, and no correction of a shift.
    assert note.startswith("biases of 4 of nunchaku's modules are rounded to torch.bfloat16")
    opened = NunchakuFile(tmp_path / "ours.safetensors")
    assert set(opened.specs) == set(layers)
    assert opened.kind == "nunchaku SVDQuant NVFP4"
    for name, layer in layers.items():
        again = opened.layer(name)
        assert reads_back(again, layer), name
        kept = [k for k in layer.tensors if k != "bias"]
        assert [k for k in kept if not same_bits(again.tensors[k], layer.tensors[k])] == [], name
    for key, tensor in load_file(tmp_path / "ours.safetensors").items():
        if key.endswith(("wcscales", "wtscale")):
            assert torch.equal(torch.frexp(tensor.float())[0], torch.full(tensor.shape, 0.5)), key


@pytest.mark.parametrize("key", ["weight", "weight_scale", "outer_scale"])
def test_what_is_changed_does_not_read_back(key, ours):
    layer = ours[0][MLP]
    tensor = layer.tensors[key].clone()
    if key == "outer_scale":
        tensor[0, 3] *= 2
    else:
        tensor.view(torch.uint8)[3, 5] ^= 1
    assert not reads_back(QuantizedLayer(MLP, layer.spec, layer.tensors | {key: tensor}), layer)


def test_one_outer_scale_for_all_rows(ours, tmp_path):
    """It has fp32 in the file, and nothing of it is rounded."""
    layers, rest = ours
    third = torch.tensor(1 / 3)
    save(tmp_path / "x.safetensors", layers | {MLP: with_outer(layers[MLP], third)}, rest, "flux", {})
    file = load_file(tmp_path / "x.safetensors")
    stored = "transformer_blocks.0.mlp_fc1"
    assert torch.equal(file[f"{stored}.wtscale"], third[None])
    assert f"{stored}.wcscales" not in file
    again = NunchakuFile(tmp_path / "x.safetensors").layer(MLP)
    assert torch.equal(again.tensors["outer_scale"], third.expand(1, 1024))


def test_outer_scales_that_16_bits_do_not_have(ours, tmp_path):
    """As of a file with both levels, or q, k and v of their own: rounded, and said to be."""
    layers, rest = ours
    outer = torch.rand(768, generator=torch.Generator().manual_seed(0)) + 1
    change = (outer.bfloat16().float() / outer - 1).abs().max()
    notes = save(tmp_path / "x.safetensors", layers | {QKV: with_outer(layers[QKV], outer)}, rest, "flux", {})
    assert notes[0] == (
        f"{QKV}: scales of its out-channels are rounded to torch.bfloat16, by at most {change:.2g} of "
        "themselves"
    )
    again = NunchakuFile(tmp_path / "x.safetensors").layer(QKV)
    assert torch.equal(again.tensors["outer_scale"][0], outer.bfloat16().float())


def halves(layers):
    in_half = lambda t: t.half() if t.dtype in (torch.bfloat16, torch.float32) else t
    keep = lambda layer: {k: t if k == "outer_scale" else in_half(t) for k, t in layer.tensors.items()}
    return {name: QuantizedLayer(name, layer.spec, keep(layer)) for name, layer in layers.items()}


def test_fp16_has_the_largest_power_of_two_apart(ours, tmp_path):
    """nunchaku rounds to 16 bits behind wtscale: in fp16 sums of weights that have e4m3's range would be
    infinite."""
    layers, rest = halves(ours[0]), ours[1]
    save(tmp_path / "half.safetensors", layers, rest, "flux", {})
    file, opened = load_file(tmp_path / "half.safetensors"), NunchakuFile(tmp_path / "half.safetensors")
    channels = [t for k, t in file.items() if k.endswith("wcscales")]
    assert channels
    assert all(t.dtype == torch.float16 and t.max() == 1 for t in channels)
    for name, layer in layers.items():
        if not layer.spec.weight_only:
            assert same_bits(opened.layer(name).tensors["outer_scale"], layer.tensors["outer_scale"]), name
    outer = layers[QKV].tensors["outer_scale"][0].clone()
    outer[7] *= 2.0**-30
    apart = layers | {QKV: with_outer(layers[QKV], outer)}
    with pytest.raises(
        SpecError, match=r"the scales of its out-channels are too far apart for torch\.float16"
    ):
        save(tmp_path / "apart.safetensors", apart, rest, "flux", {})


@pytest.mark.parametrize(
    ("layer", "change", "why"),
    [
        (
            MLP,
            lambda part: replace(part, weight=four_bits("int")[0], activation=four_bits("int")[1]),
            "has integer codes, and most layers nvfp4 codes: a nunchaku file has one kind",
        ),
        (
            MLP,
            lambda part: replace(part, activation=four_bits("int")[1]),
            "has integer codes, and most layers nvfp4 codes",
        ),
        (MLP, lambda part: replace(part, activation=None), "is weight-only, and has 4-bit activations"),
        (MLP, lambda part: replace(part, rotation=64), r"rotates its input \(Hadamard 64\)"),
        (MLP, lambda part: replace(part, principal=8), "takes principal components out of its input"),
        (
            "double_blocks.0.img_mod.lin",
            lambda part: replace(part, weight=four_bits("nvfp4")[0]),
            "has nvfp4 codes, and nunchaku's modulation layers have integers",
        ),
    ],
)
def test_what_cannot_be_written_is_said_before(layer, change, why, ours):
    specs = {name: held.spec for name, held in ours[0].items()}
    (part,) = specs[layer].parts
    found = losses(specs | {layer: replace(specs[layer], parts=(change(part),))}, "flux")
    assert list(found) == [layer]
    assert re.search(why, found[layer])


def test_one_layer_of_nvfp4_in_a_model_of_integers(ours):
    """The kind that most layers have is the file's."""
    specs = {name: held.spec for name, held in ours[0].items()}
    integers = {
        name: replace(
            spec,
            parts=tuple(
                replace(part, weight=four_bits("int")[0], activation=four_bits("int")[1])
                for part in spec.parts
            ),
        )
        for name, spec in specs.items()
        if not spec.weight_only and not name.endswith((".2", "linear2"))
    }
    found = losses(specs | integers | {MLP: specs[MLP]}, "flux")
    assert set(found) == {MLP, *(n for n in specs if n.endswith(("mlp.2", "linear2")))}
    assert found[MLP] == "has nvfp4 codes, and most layers integer codes: a nunchaku file has one kind"
