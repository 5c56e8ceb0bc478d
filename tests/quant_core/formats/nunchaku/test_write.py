"""Writing models of ours as nunchaku's files, and what is said of those that cannot be (see `test_nunchaku`)."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from comfyui_nibble.kernels.operator.packing import pack
from comfyui_nibble.kernels.operator.spec import LinearSpec, PartSpec, SpecError
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.nunchaku.read import NunchakuFile
from comfyui_nibble.quant_core.formats.nunchaku.write import losses, reads_back, save
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.assets import nunchaku as made
from comfyui_nibble.tests.assets.nunchaku import D, gelu_tokens, tokens, write
from comfyui_nibble.tests.support import relative_error, sqnr_db

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def ours(tiny_state):
    """The small FLUX by SVDQuant of rank 24 without data: ({name: layer}, {key: tensor} of the rest)."""
    shapes, method = {k: tuple(v.shape) for k, v in tiny_state.items()}, by_name("svdquant")
    config = method.configured(rank=24, gptq=False, iterations=0)
    found = quantize_layers(FLUX.layers(shapes), Tensors(tiny_state), method, config)
    layers = {layer.name: layer for layer, _ in found}
    return layers, {k: v for k, v in tiny_state.items() if k.rpartition(".")[0] not in layers}


def in_the_file(layer):
    """A layer's bias behind what the format makes of it: 16 bits, with 1 added to the scales of modulation
    layers."""
    bias = layer.tensors["bias"].float()
    if not layer.spec.weight_only:
        return bias.bfloat16().float()
    plus = torch.zeros(6 if len(bias) == 6 * 256 else 3, 256)
    plus[1::3] = 1
    return (bias + plus.flatten()).bfloat16().float() - plus.flatten()


def test_a_model_of_ours(ours, tmp_path):
    layers, rest = ours
    assert losses({name: layer.spec for name, layer in layers.items()}, "flux") == {}
    notes = save(tmp_path / "ours.safetensors", layers, rest, "flux", {})
    opened = NunchakuFile(tmp_path / "ours.safetensors")
    # Four modulation layers with 1 added, two layers behind GELU and the halves of two with a correction in
    # fp32.
    change = max(
        (layer.tensors["bias"].float() - opened.layer(name).tensors["bias"].float()).abs().max().item()
        for name, layer in layers.items()
    )
    assert notes == [
        f"biases of 8 of nunchaku's modules are rounded to torch.bfloat16, by at most {change:.2g}"
    ]
    assert set(opened.specs) == set(layers)
    assert all(torch.equal(opened.tensor(k), t) for k, t in rest.items())
    assert {layer.rank for layer in opened.specs.values() if not layer.weight_only} == {
        32
    }  # 24, filled up; linear1's is one branch again
    for name, layer in layers.items():
        again, k = opened.layer(name), layer.spec.in_features
        x = (
            torch.cat([tokens(256), gelu_tokens(1024)], 1)
            if k == 1280
            else gelu_tokens(k)
            if k == 1024
            else tokens(k)
        )
        assert torch.equal(again.tensors["bias"].float(), in_the_file(layer)), name
        assert relative_error(layer(x) - layer.tensors["bias"], again(x) - again.tensors["bias"]) < 1e-5, name
        assert reads_back(again, layer), name
        for key, other in (
            {"weight": 1, "weight_scale": 1.02, "proj_up": 1.02, "bias": 0.1}.items()
            if name.endswith("mlp.2")
            else ()
        ):
            changed_tensor = (
                again.tensors[key] + other if key in ("weight", "bias") else again.tensors[key] * other
            ).to(again.tensors[key].dtype)
            assert not reads_back(
                QuantizedLayer(name, again.spec, again.tensors | {key: changed_tensor}), layer
            ), key


def changed(spec, **fields):
    """The spec with other fields in its first part; those of weight and activation by weight_x and
    activation_x."""
    part = spec.parts[0]
    for side in ("weight", "activation"):
        own = {k.removeprefix(f"{side}_"): v for k, v in fields.items() if k.startswith(f"{side}_")}
        part = replace(part, **{side: replace(getattr(part, side), **own)}) if own else part
    part = replace(part, **{k: v for k, v in fields.items() if not k.startswith(("weight_", "activation_"))})
    return replace(spec, parts=(part, *(replace(p, rank=part.rank) for p in spec.parts[1:])))


@pytest.mark.parametrize(
    ("layer", "fields", "why"),
    [
        (
            "double_blocks.0.img_mlp.0",
            {"rotation": 64},
            r"rotates its input \(Hadamard 64\), which nunchaku does not",
        ),
        (
            "double_blocks.0.img_mlp.0",
            {"kronecker": (16, 16)},
            "has a learned transform, which nunchaku does not",
        ),
        (
            "double_blocks.0.img_mlp.0",
            {"weight_granularity": "channel"},
            "has 4-bit weights, one scale per channel; nunchaku has 4 bits, one for 64 channels",
        ),
        ("single_blocks.0.linear1", {"weight_bits": 2}, "has 2-bit weights"),
        (
            "single_blocks.0.linear2",
            {"activation_bits": 8},
            "has 8-bit activations per group, clip 1; nunchaku has 4 bits",
        ),
        (
            "single_blocks.0.linear2",
            {"activation_clip": 0.9},
            "clip 0.9; nunchaku has 4 bits, 64 channels, clip 1",
        ),
        (
            "double_blocks.0.img_attn.qkv",
            {"activation": None},
            "is weight-only, and has 4-bit activations in nunchaku",
        ),
        (
            "double_blocks.0.txt_mlp.2",
            {"activation_unsigned": False, "activation_shift": 0.0},
            "signed activations with a shift of 0; nunchaku's are unsigned",
        ),
        (
            "double_blocks.0.img_mod.lin",
            {"rank": 32},
            "has a low-rank branch of rank 32, and nunchaku's modulation layers have none",
        ),
        ("double_blocks.0.img_mod.lin", {"smooth": True}, "and weight-only without smoothing in nunchaku"),
    ],
)
def test_what_cannot_be_written_is_said_before(layer, fields, why, ours, tmp_path):
    specs = {name: held.spec for name, held in ours[0].items()}
    found = losses(specs | {layer: changed(specs[layer], **fields)}, "flux")
    assert list(found) == [layer]
    assert re.search(why, found[layer])


def test_other_losses(ours, tmp_path):
    layers, rest = ours
    specs = {name: held.spec for name, held in layers.items()}
    order = specs["single_blocks.0.linear1"]
    assert (
        "in an order of its own"
        in losses(specs | {"single_blocks.0.linear1": replace(order, order=True)}, "flux")[
            "single_blocks.0.linear1"
        ]
    )
    left = {name: spec for name, spec in specs.items() if name != "double_blocks.0.img_attn.proj"}
    assert losses(left, "flux") == {
        "double_blocks.0.img_attn.proj": "stays in 16 bits here, and is one of nunchaku's quantized layers"
    }
    more = specs | {"txt_in": specs["double_blocks.0.img_mlp.0"]}
    assert losses(more, "flux") == {"txt_in": "is W4A4 g64 r24, and stays in 16 bits in nunchaku"}
    odd = replace(specs["double_blocks.0.img_mlp.0"], out_features=1000)
    assert (
        "needs multiples of 128 and 128"
        in losses(specs | {"double_blocks.0.img_mlp.0": odd}, "flux")["double_blocks.0.img_mlp.0"]
    )
    assert "is of a PixArt" in losses({"blocks.0.attn.qkv": odd}, "pixart")["blocks.0.attn.qkv"]
    del (some := dict(layers))["double_blocks.0.img_attn.proj"]
    with pytest.raises(
        SpecError,
        match=r"1 layers cannot be written for nunchaku, among them double_blocks\.0\.img_attn\.proj",
    ):
        save(tmp_path / "x.safetensors", some, rest, "flux", {})
    assert not (tmp_path / "x.safetensors").exists()


def test_a_low_rank_that_is_no_offset(ours, tmp_path):
    """At rank K / 64 the description alone does not tell."""
    layers, rest = ours
    name = "double_blocks.0.img_mod.lin"
    held = layers[name]
    low = {"proj_down": torch.randn(256, 4).bfloat16(), "proj_up": torch.randn(1536, 4).bfloat16()}
    with pytest.raises(
        SpecError, match=rf"layer {name} cannot be written for nunchaku: its low rank is no offset"
    ):
        save(
            tmp_path / "x.safetensors",
            layers | {name: QuantizedLayer(name, changed(held.spec, rank=4), held.tensors | low)},
            rest,
            "flux",
            {},
        )


def test_offsets_without_zeros_in_16_bits(ours, tmp_path):
    """An offset of another maker, whose zero = offset - 8 scale is no bf16 number: it is rounded, and said to
    be."""
    layers, rest = ours
    name = "double_blocks.0.img_mod.lin"
    held, g = layers[name], torch.Generator().manual_seed(0)
    scale = held.tensors["weight_scale"]
    up = (scale.T.float() * torch.rand(1536, 4, generator=g)).bfloat16()
    low = {"proj_down": torch.eye(4).repeat_interleave(64, 0).bfloat16(), "proj_up": up}
    held = QuantizedLayer(name, changed(held.spec, rank=4), held.tensors | low)
    notes = save(tmp_path / "x.safetensors", layers | {name: held}, rest, "flux", {})
    assert notes[:1] == [
        f"{name}: zeros of its groups are rounded to torch.bfloat16, which has no room for offset - 8 scale"
    ]
    found = NunchakuFile(tmp_path / "x.safetensors").layer(name).dequantize()
    assert (found - held.dequantize()).abs().max() <= scale.float().max() * 8 / 2**8


def test_layers_that_nunchaku_joins_get_one_smoothing(tmp_path):
    """Qwen-Image's to_q, to_k and to_v, quantized apart; a shared low rank is kept once."""
    model = made.qwen_image()
    opened = NunchakuFile(write(tmp_path, model.file))
    layers = {name: opened.layer(name) for name in opened.specs}
    name, g = f"{D}attn.to_k", torch.Generator().manual_seed(5)
    own = layers[name].tensors["smooth_factor"] * (0.8 + 0.4 * torch.rand(128, generator=g)).bfloat16()
    layers[name] = QuantizedLayer(name, layers[name].spec, layers[name].tensors | {"smooth_factor": own})
    weight = layers[name].dequantize()
    notes = save(
        tmp_path / "again.safetensors", layers, {k: opened.tensor(k) for k in opened.rest}, "qwen_image", {}
    )
    again = NunchakuFile(tmp_path / "again.safetensors")
    decibels = sqnr_db(weight, again.layer(name).dequantize())
    assert notes == [
        f"{name} takes the smoothing of {D}attn.to_q, quantized again at {decibels:.1f} dB of its weight"
    ]
    assert decibels > 20
    assert again.specs[name].rank == 16
    assert torch.equal(again.layer(f"{D}attn.to_q").dequantize(), layers[f"{D}attn.to_q"].dequantize())


def test_weight_only_layers_that_nunchaku_has_in_16_bits(tmp_path):
    opened = NunchakuFile(write(tmp_path, made.z_image().file))
    layers, rest = (
        {name: opened.layer(name) for name in opened.specs},
        {k: opened.tensor(k) for k in opened.rest},
    )
    name, weight = "layers.0.adaLN_modulation.0", rest.pop("layers.0.adaLN_modulation.0.weight")
    part = PartSpec(0, 256, activation=None)
    scale = (weight.float().view(512, 4, 64).abs().amax(-1) / 7).bfloat16()
    codes = (
        (weight.float().view(512, 4, 64) / scale[..., None].float())
        .round()
        .clamp(-7, 7)
        .to(torch.int8)
        .view(512, 256)
    )
    tensors = {
        "weight": pack(codes, 4),
        "weight_scale": scale.T.contiguous(),
        "bias": rest.pop(f"{name}.bias"),
    }
    layers[name] = QuantizedLayer(name, LinearSpec(256, 512, (part,)), tensors)
    notes = save(tmp_path / "again.safetensors", layers, rest, "z_image", {})
    assert notes == [f"1 weight-only layers are stored in 16 bits, as nunchaku has them: {name}"]
    again = NunchakuFile(tmp_path / "again.safetensors")
    assert torch.equal(again.tensor(f"{name}.weight"), layers[name].dequantize().bfloat16())
    assert torch.equal(again.tensor(f"{name}.bias"), tensors["bias"])


def test_fp16_has_no_room(ours, tmp_path):
    layers, rest = ours
    half = {
        name: QuantizedLayer(
            name, layer.spec, {k: t.half() if t.is_floating_point() else t for k, t in layer.tensors.items()}
        )
        for name, layer in layers.items()
    }
    save(tmp_path / "half.safetensors", half, rest, "flux", {})
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {
        torch.int8,
        torch.int32,
        torch.float16,
    }
    with pytest.raises(
        SpecError, match=r"img_in\.bias: values up to 1e\+05 are too large for torch\.float16"
    ):
        save(tmp_path / "half.safetensors", half, rest | {"img_in.bias": torch.full((256,), 1e5)}, "flux", {})
