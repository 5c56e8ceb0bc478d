"""Modulation as awq_w4a16, for a ComfyUI after 0.33; comfy-kitchen's own layout and operator are the judges."""

import json
from dataclasses import replace

import pytest
import torch
from comfy_kitchen.backends.eager import awq
from comfy_kitchen.tensor import TensorCoreAWQW4A16Layout
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.convert import convert
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.formats import nibble as pack
from comfyui_nibble.quant_core.formats.detect import open_quantized
from comfyui_nibble.quant_core.formats.kitchen import native
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen_out
from comfyui_nibble.quant_core.formats.zero_points import indicators
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.methods import weight_only
from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state
from comfyui_nibble.tests.support import nibble, relative_error

NAME, N, K = "double_blocks.0.img_mod.lin", 96, 256


@pytest.fixture(scope="module")
def plain():
    """A weight-only layer without a low rank, as data-free fits of modulation are."""
    g = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(N, K, generator=g) / 16).bfloat16(), torch.randn(N, generator=g).bfloat16()
    return weight_only.fit(
        Problem(Layer(NAME, NAME, K, N, (Part(0, K),), NAME, True), weight, bias, None)
    ).layer


def with_low_rank(layer, down, up):
    part = replace(layer.spec.parts[0], rank=down.shape[1])
    return QuantizedLayer(
        layer.name, replace(layer.spec, parts=(part,)), layer.tensors | {"proj_down": down, "proj_up": up}
    )


@pytest.fixture(scope="module")
def zeroed(plain):
    """One whose low rank is nothing but a zero point for each group, as files in awq_w4a16 are read."""
    up = 0.02 * torch.randn(N, K // 64, generator=torch.Generator().manual_seed(1))
    return with_low_rank(plain, indicators(K, 64, torch.bfloat16), up.bfloat16())


@pytest.fixture(scope="module")
def low_rank(plain):
    g = torch.Generator().manual_seed(2)
    return with_low_rank(
        plain, torch.randn(K, 4, generator=g).bfloat16(), torch.randn(N, 4, generator=g).bfloat16()
    )


def x():
    return torch.randn(7, K, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["plain", "zeroed"])
def test_it_computes_the_same_in_comfy_kitchen(request, tmp_path, kind):
    """The layer as a newer ComfyUI makes it of the file: format, group size and the two tensors beside the
    codes."""
    layer = request.getfixturevalue(kind)
    native.save(tmp_path / "a", {NAME: layer}, {}, {}, awq=True)
    t = {k.removeprefix(f"{NAME}."): v for k, v in load_file(tmp_path / "a").items()}
    conf = json.loads(bytes(t["comfy_quant"].tolist()))
    assert conf == {"format": "awq_w4a16", "group_size": 64}
    assert {leaf: (v.dtype, tuple(v.shape)) for leaf, v in t.items() if leaf != "comfy_quant"} == {
        "weight": (torch.int8, (N, K // 2)),
        "weight_scale": (torch.bfloat16, (K // 64, N)),
        "weight_zeros": (torch.bfloat16, (K // 64, N)),
        "bias": (torch.bfloat16, (N,)),
    }
    scale, zeros = t["weight_scale"].float(), t["weight_zeros"].float()
    params = TensorCoreAWQW4A16Layout.Params(
        scale=scale, orig_dtype=torch.float32, orig_shape=(N, K), zeros=zeros, group_size=64
    )
    assert relative_error(layer.dequantize(), TensorCoreAWQW4A16Layout.dequantize(t["weight"], params)) < 1e-6
    assert (
        relative_error(layer(x()), awq.gemv_awq_w4a16(x(), t["weight"], scale, zeros, t["bias"].float()))
        < 1e-5
    )


def test_a_low_rank_of_its_own_is_a_loss(low_rank, zeroed, plain):
    layers = {"low rank": low_rank, "zeroed": zeroed, "plain": plain}
    specs = {name: layer.spec for name, layer in layers.items()}
    said = {"low rank": "has 4-bit weights for 16-bit activations with a low rank of 4; awq_w4a16 has none"}
    assert native.losses(specs, layers.get) == said
    assert kitchen_out.losses(specs, layers.get) == said
    assert set(native.losses(specs)) == set(kitchen_out.losses(specs)) == set(specs)
    with pytest.raises(
        ValueError, match="layer low rank has 4-bit weights for 16-bit activations with a low rank of 4"
    ):
        native.save("never", layers, {}, {}, awq=True)


@pytest.mark.parametrize(
    ("version", "yes"),
    [("0.31", False), ("0.33.0", False), ("0.37.9", False), ("0.38", True), ("v0.46.1", True), ("1.0", True)],
)
def test_which_comfyui_has_it(version, yes):
    assert native.has_awq(version) == yes


@pytest.mark.parametrize("version", ["", "newest", "0.30", "0.3.64", "0.38-rc1", "38"])
def test_what_is_no_version(version):
    with pytest.raises(ValueError, match="expected a version from 0.31 on, such as 0.33"):
        native.has_awq(version)


@pytest.fixture(scope="module")
def modulated(tmp_path_factory, low_rank):
    """A Nibble file of a small FLUX whose modulation has no low rank, but for one layer."""
    folder = tmp_path_factory.mktemp("modulated")
    source, path = folder / "full.safetensors", folder / "nibble.safetensors"
    save_file(random_state(flux_shapes(1, 1, 128, 64, 64)), source)
    nibble("quantize", source, path, "--method", "convrot")
    return path


def test_convert_keeps_modulation_in_4_bit(modulated, tmp_path):
    """By default the file is for ComfyUI 0.31 and later, and modulation has 8 bits there."""
    held, out = open_quantized(modulated), {}
    modulation = {name for name, spec in held.specs.items() if spec.weight_only}
    assert len(modulation) == 3
    assert set(convert.plan(held, "native").lossy) == modulation
    assert convert.plan(held, "native", "0.38").lossless
    for comfyui, options in (("0.33", ["--lossy"]), ("0.38", [])):
        out[comfyui] = tmp_path / f"{comfyui}.safetensors"
        said = nibble("convert", modulated, out[comfyui], "--to", "native", "--comfyui", comfyui, *options)
        assert f"{len(held.specs) - len(modulation) * bool(options)} layers read back bit for bit" in said
        with safe_open(out[comfyui], "pt") as f:
            declared = json.loads(f.metadata()["_quantization_metadata"])["layers"]
        wanted = "awq_w4a16" if comfyui == "0.38" else "int8_tensorwise"
        assert {declared[name]["format"] for name in modulation} == {wanted}
    assert out["0.38"].stat().st_size < out["0.33"].stat().st_size
    back = open_quantized(out["0.38"])
    for name in modulation:
        assert torch.equal(back.layer(name).dequantize(), held.layer(name).dequantize())


def test_a_low_rank_is_dropped_where_that_is_asked_for(modulated, tmp_path):
    held = open_quantized(modulated)
    name = next(name for name, spec in held.specs.items() if spec.weight_only)
    layers = {n: held.layer(n) for n in held.specs}
    g, spec = torch.Generator().manual_seed(4), held.specs[name]
    down = torch.randn(spec.in_features, 8, generator=g) / spec.in_features**0.5
    layers[name] = with_low_rank(
        layers[name], down.bfloat16(), (0.02 * torch.randn(spec.out_features, 8, generator=g)).bfloat16()
    )
    path, out = tmp_path / "ranked.safetensors", tmp_path / "out.safetensors"
    pack.save(path, layers, {k: held.tensor(k) for k in held.rest}, held.family, {}, [])
    with pytest.raises(ValueError, match=r"replacement awq: .*Ask for one of 0.38 or newer \(--comfyui 0.38"):
        nibble("convert", path, out, "--to", "native", "--lossy", "--replacement", "awq")
    said = nibble(
        "convert", path, out, "--to", "native", "--lossy", "--comfyui", "0.38", "--replacement", "awq"
    )
    assert (
        f"1 as W4A16 rounded to nearest instead, {name}: it has 4-bit weights for 16-bit activations with "
        "a low rank of 8"
    ) in said
    back = open_quantized(out)
    assert all(
        back.specs[n].weight_only and back.specs[n].parts[0].weight.bits == 4
        for n in held.specs
        if held.specs[n].weight_only
    )
    assert (
        0.01 < relative_error(layers[name].dequantize(), back.layer(name).dequantize()) < 0.15
    )  # rounded once more
