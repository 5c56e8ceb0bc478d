"""1x1 convolutions among the layers: by rule within blocks of linear layers, in a file where the name says
enough."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.convert.replace import replaced
from comfyui_nibble.quant_core.families import GENERIC, detect
from comfyui_nibble.quant_core.families.fingerprint import fingerprint
from comfyui_nibble.quant_core.families.pointwise import spatial_of, why_unsure
from comfyui_nibble.quant_core.formats.kitchen import native
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen_out
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.formats.nunchaku.write import losses as nunchaku_losses
from comfyui_nibble.quant_core.layer.linear import QuantLinear
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.support import relative_error

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((8, 4), 0),
        ((8, 4, 1), 1),
        ((8, 4, 1, 1), 2),
        ((8, 4, 3), None),
        ((8, 4, 1, 3), None),
        ((8,), None),
        ((), None),
        ((8, 4, 1, 1, 1), None),
    ],
)
def test_shapes(shape, want):
    assert spatial_of(shape) == want


def ace_shapes(width=128, hidden=192, blocks=3):
    """ACE-Step's blocks: linear attention, and an MLP of 1x1 convolutions around a depthwise one."""
    shapes = {"patch.proj.weight": (width, 8, 1, 1)}
    for p in (f"transformer_blocks.{i}." for i in range(blocks)):
        shapes |= {f"{p}attn.to_{x}.weight": (width, width) for x in "qkv"}
        shapes |= {
            f"{p}ff.inverted_conv.conv.weight": (2 * hidden, width, 1),
            f"{p}ff.inverted_conv.conv.bias": (2 * hidden,),
        }
        shapes |= {
            f"{p}ff.depth_conv.conv.weight": (2 * hidden, 1, 3),
            f"{p}ff.point_conv.conv.weight": (width, hidden, 1),
        }
        shapes |= {
            f"{p}mystery.weight": (width, width, 1, 1),
            f"{p}skip_connection.weight": (width, width, 1, 1),
        }
    return shapes


def test_rules_take_those_within_blocks():
    layers = {layer.name: layer for layer in GENERIC.layers(ace_shapes())}
    assert {n.split(".", 2)[2] for n in layers} == {
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "ff.inverted_conv.conv",
        "ff.point_conv.conv",
        "mystery",
    }
    conv = layers["transformer_blocks.1.ff.point_conv.conv"]
    assert (conv.block, conv.in_features, conv.out_features, conv.spatial) == (
        "transformer_blocks.1",
        192,
        128,
        1,
    )
    assert layers["transformer_blocks.0.mystery"].spatial == 2
    assert layers["transformer_blocks.0.attn.to_q"].spatial == 0
    linear = {k: s for k, s in ace_shapes().items() if len(s) == 2}
    assert [n for n in layers if not layers[n].spatial] == [layer.name for layer in GENERIC.layers(linear)]


def test_a_calibration_of_earlier_versions_still_belongs_to_the_model():
    """Its fingerprint was of linear layers."""
    shapes = ace_shapes()
    state = {k: torch.randn(s, generator=torch.Generator().manual_seed(0)) for k, s in shapes.items()}
    linear = GENERIC.layers({k: s for k, s in shapes.items() if len(s) == 2})
    assert fingerprint(GENERIC.layers(shapes), state.get) == fingerprint(linear, state.get)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A file quantized by the command's own function, its rows, and the weights it was made from."""
    folder = tmp_path_factory.mktemp("ace")
    g = torch.Generator().manual_seed(0)
    state = {
        k: (torch.randn(s, generator=g) / max(1, s[-2] if len(s) > 2 else s[-1]) ** 0.5).bfloat16()
        for k, s in ace_shapes().items()
    }
    save_file(state, folder / "ace.safetensors")
    assert detect({k: tuple(t.shape) for k, t in state.items()}) is GENERIC
    rows = quantize_file(
        folder / "ace.safetensors",
        folder / "out.safetensors",
        METHODS["svdquant"],
        METHODS["svdquant"].configured(rank=8),
    )
    return PackFile(folder / "out.safetensors"), {r.name: r for r in rows}, state


def test_the_command_takes_what_names_tell_and_names_the_rest(quantized):
    pack, rows, state = quantized
    taken = {n for n, s in pack.specs.items() if s.spatial}
    assert taken == {
        f"transformer_blocks.{i}.ff.{x}_conv.conv" for i in range(3) for x in ("inverted", "point")
    }
    left = rows["transformer_blocks.0.mystery"]
    assert (left.what, left.quantized) == ("16 bit", False)
    assert "whose strides and groups a file does not say" in left.note
    assert torch.equal(
        pack.tensor("transformer_blocks.0.mystery.weight"), state["transformer_blocks.0.mystery.weight"]
    )
    assert why_unsure(next(x for x in GENERIC.layers(ace_shapes()) if x.spatial == 1)) == ""


def test_the_file_has_the_model_s_shapes(quantized):
    pack, _, state = quantized
    assert pack.logical_shapes() == {k: tuple(t.shape) for k, t in state.items()}
    for name in ("transformer_blocks.0.ff.inverted_conv.conv", "transformer_blocks.0.ff.point_conv.conv"):
        layer = pack.layer(name)
        assert layer.spec.describe().endswith("1x1 convolution")
        assert relative_error(state[f"{name}.weight"].flatten(1).float(), layer.dequantize()) < 0.1
        x = torch.randn(2, layer.spec.in_features, 5)
        assert torch.equal(QuantLinear(layer)(x), layer(x.mT).mT)


def test_other_formats_have_them_in_16_bit(quantized):
    pack, _, state = quantized
    name = "transformer_blocks.0.ff.point_conv.conv"
    spec = pack.specs[name]
    for found in (kitchen_out.losses({name: spec}), native.losses({name: spec})):
        assert found[name].endswith("1x1 convolution; ComfyUI has quantized linear layers alone")
    flux = "double_blocks.0.img_attn.qkv"
    assert (
        nunchaku_losses({flux: spec}, "flux")[flux] == "is a 1x1 convolution, which nunchaku has in 16 bits"
    )
    layers, rest = replaced({name: pack.layer(name)}, {}, [name], "int8")
    assert not layers
    assert rest[f"{name}.weight"].shape == state[f"{name}.weight"].shape
