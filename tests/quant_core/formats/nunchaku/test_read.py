"""Reading and writing nunchaku's files, against what random files hold in natural order
(tests/assets/nunchaku.py)."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from comfyui_nibble.quant_core.formats.nunchaku.read import NunchakuFile, is_nunchaku
from comfyui_nibble.quant_core.formats.nunchaku.targets import losses
from comfyui_nibble.quant_core.formats.nunchaku.write import save
from comfyui_nibble.tests.assets import nunchaku as made
from comfyui_nibble.tests.assets.nunchaku import INT4, D, S, gelu_tokens, tokens, write
from comfyui_nibble.tests.assets.synthetic import flux_shapes
from comfyui_nibble.tests.support import relative_error, sqnr_db


def same(a, b):
    """The same layers and other tensors, bit by bit."""
    assert (a.specs, a.rest, a.family) == (b.specs, b.rest, b.family)
    for name in a.specs:
        first, second = a.layer(name).tensors, b.layer(name).tensors
        assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first), (
            name
        )
    assert all(torch.equal(a.tensor(k), b.tensor(k)) for k in a.rest)


def linear(x, own, unsigned=False):
    """y of a W4A4 module as nunchaku computes it, without its 16-bit roundings: x (M, K), fp32."""
    own = {k: t.float() for k, t in own.items()}
    top, low = (15, 0) if unsigned else (7, -7)
    smoothed = ((x + 0.171875 if unsigned else x) / own["smooth"]).view(len(x), -1, 64)
    scale = smoothed.abs().amax(-1, keepdim=True) / top
    codes = (smoothed / scale).round().clamp(low, top)
    weight = own["codes"].view(len(own["codes"]), -1, 64) * own["scale"].T[..., None]
    return (
        torch.einsum("mgk,ngk->mn", codes * scale, weight)
        + x @ own["down"] @ own["up"].T
        + own.get("bias", 0)
    )


def modulation(x, own):
    """y of a W4A16 module with the model's own rows and bias."""
    own = {k: t.float() for k, t in own.items()}
    weight = own["codes"].view(*own["scale"].shape, 64) * own["scale"][..., None] + own["zero"][..., None]
    return x @ weight.flatten(1).T + own["bias"]


def test_every_layer_of_flux_computes_what_nunchaku_does(model, tmp_path):
    opened, own = NunchakuFile(write(tmp_path, made.old_names(model.file))), model.natural
    x, after, h = tokens(128), gelu_tokens(512), 128
    both = torch.cat([x, after], 1)
    expected = {
        "double_blocks.0.img_mod.lin": (x, modulation(x, own[f"{D}norm1.linear"])),
        "double_blocks.0.txt_mod.lin": (x, modulation(x, own[f"{D}norm1_context.linear"])),
        "double_blocks.0.img_attn.qkv": (x, linear(x, own[f"{D}attn.to_qkv"])),
        "double_blocks.0.txt_attn.qkv": (x, linear(x, own[f"{D}attn.add_qkv_proj"])),
        "double_blocks.0.img_attn.proj": (x, linear(x, own[f"{D}attn.to_out.0"])),
        "double_blocks.0.txt_attn.proj": (x, linear(x, own[f"{D}attn.to_add_out"])),
        "double_blocks.0.img_mlp.0": (x, linear(x, own[f"{D}ff.net.0.proj"])),
        "double_blocks.0.img_mlp.2": (after, linear(after, own[f"{D}ff.net.2"], unsigned=True)),
        "double_blocks.0.txt_mlp.0": (x, linear(x, own[f"{D}ff_context.net.0.proj"])),
        "double_blocks.0.txt_mlp.2": (after, linear(after, own[f"{D}ff_context.net.2"], unsigned=True)),
        "single_blocks.0.modulation.lin": (x, modulation(x, own[f"{S}norm.linear"])),
        "single_blocks.0.linear1": (
            x,
            torch.cat([linear(x, own[f"{S}attn.to_qkv"]), linear(x, own[f"{S}mlp_fc1"])], 1),
        ),
        "single_blocks.0.linear2": (
            both,
            linear(x, own[f"{S}attn.to_out"]) + linear(after, own[f"{S}mlp_fc2"], unsigned=True),
        ),
    }
    assert set(opened.specs) == set(expected)
    for name, (given, wanted) in expected.items():
        assert relative_error(wanted, opened.layer(name)(given)) < 1e-5, name
    assert opened.specs["single_blocks.0.linear1"].rank == 32  # both branches of 16 side by side
    assert [(p.stop, p.activation.shift) for p in opened.specs["single_blocks.0.linear2"].parts] == [
        (h, 0.0),
        (5 * h, 0.171875),
    ]
    assert opened.notes == ()


def test_the_rest_of_flux(model, tmp_path):
    opened = NunchakuFile(write(tmp_path, model.file))
    assert opened.logical_shapes() == flux_shapes(hidden=128, context=64, pooled=64)
    shift, scale = model.file["norm_out.linear.weight"].chunk(2)
    assert torch.equal(opened.tensor("final_layer.adaLN_modulation.1.weight"), torch.cat([scale, shift]))
    assert torch.equal(opened.tensor("txt_in.weight"), model.file["context_embedder.weight"])
    assert torch.equal(
        opened.tensor("double_blocks.0.txt_attn.norm.key_norm.scale"),
        model.file[f"{D}attn.norm_added_k.weight"],
    )
    assert torch.equal(
        opened.tensor("single_blocks.0.norm.query_norm.scale"), model.file[f"{S}attn.norm_q.weight"]
    )


def test_all_four_forms_of_flux_are_one_model(model, tmp_path):
    new, old = write(tmp_path / "new", model.file), made.old_names(model.file)
    one = write(tmp_path / "one", old)
    blocks = {k: t for k, t in old.items() if "transformer_blocks." in k}
    folder = write(tmp_path / "two", blocks, None, "transformer_blocks.safetensors").parent
    write(folder, {k: t for k, t in old.items() if k not in blocks}, None, "unquantized_layers.safetensors")
    prefixed = write(tmp_path / "prefixed", {f"model.diffusion_model.{k}": t for k, t in model.file.items()})
    for path in (
        one,
        folder,
        folder / "transformer_blocks.safetensors",
        folder / "unquantized_layers.safetensors",
        prefixed,
    ):
        same(NunchakuFile(path), NunchakuFile(new))


def test_what_is_one_of_these_files(model, tmp_path):
    assert is_nunchaku("a.safetensors", model.file, None)
    assert is_nunchaku("a.safetensors", made.old_names(model.file), {})
    assert not is_nunchaku(
        "a.safetensors",
        ["encoder.block.0.qweight", "encoder.block.0.wscales", "encoder.block.0.wzeros"],
        None,
    )
    assert not is_nunchaku("a.safetensors", ["double_blocks.0.img_attn.qkv.weight"], INT4)
    assert not is_nunchaku(tmp_path, [], None)
    write(tmp_path, {"a": torch.ones(1)}, None, "unquantized_layers.safetensors")
    assert is_nunchaku(tmp_path, [], None)


@pytest.mark.parametrize("zero_point", [7, None])
def test_flux_round_trip_to_the_same_bytes(zero_point, tmp_path):
    model = made.flux(double=2, single=2, zero_point=zero_point)
    first = write(tmp_path, made.old_names(model.file))
    opened = NunchakuFile(first)
    ranks = {
        opened.specs[f"{stem}.1.{leaf}"].rank
        for stem, leaf in (("double_blocks", "img_mod.lin"), ("single_blocks", "modulation.lin"))
    }
    assert ranks == ({2} if zero_point else {4})  # two groups of 64, zero + 8 scale in one column or apart
    layers = {name: opened.layer(name) for name in opened.specs}
    assert losses(opened.specs, "flux") == {}
    notes = save(
        tmp_path / "again.safetensors",
        layers,
        {k: opened.tensor(k) for k in opened.rest},
        "flux",
        {"method": "svdquant"},
    )
    assert notes == []
    before, after = load_file(first), load_file(tmp_path / "again.safetensors")
    assert set(before) == set(after)
    assert [
        k for k in before if before[k].dtype != after[k].dtype or not torch.equal(before[k], after[k])
    ] == []
    with safe_open(tmp_path / "again.safetensors", "pt") as f:
        header = f.metadata()
    assert json.loads(header["quantization_config"])["rank"] == 16
    assert (
        json.loads(header["config"])["num_single_layers"]
        == json.loads(header["comfy_config"])["model_config"]["depth_single_blocks"]
        == 2
    )
    assert header["model_class"] == "NunchakuFluxTransformer2dModel"
    assert NunchakuFile(tmp_path / "again.safetensors").provenance == {"method": "svdquant"}


def test_rows_with_a_smoothing_of_their_own(tmp_path):
    model = made.flux(one_smoothing=False)
    opened = NunchakuFile(write(tmp_path, model.file))
    assert len(opened.notes) == 1
    assert "dB" not in opened.notes[0]
    layer = opened.layer("single_blocks.0.linear1")
    own = model.natural[f"{S}mlp_fc1"]
    weight = own["codes"].float() * own["scale"].float().T.repeat_interleave(64, 1) / own["smooth"].float()
    weight += own["up"].float() @ own["down"].float().T
    found = layer.dequantize()
    assert opened.notes == (
        f"single_blocks.0.linear1: {S}mlp_fc1 has a smoothing of its own and is quantized again behind the "
        "first one's "
        f"({sqnr_db(weight, found[384:]):.1f} dB of its weight)",
    )
    assert sqnr_db(weight, found[384:]) > 15  # 4 bits, smoothings up to four times apart within a group
    qkv = model.natural[f"{S}attn.to_qkv"]
    assert relative_error(linear(tokens(128), qkv), layer(tokens(128))[:, :384]) < 1e-5


def test_two_biases_add_up(model, tmp_path):
    file = dict(model.file)
    wanted = torch.randn(128, generator=torch.Generator().manual_seed(3)).bfloat16()
    file[f"{S}attn.to_out.bias"] = made.stored_scale(wanted[None])[0]
    bias = NunchakuFile(write(tmp_path, file)).layer("single_blocks.0.linear2").tensors["bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, wanted.float() + model.natural[f"{S}mlp_fc2"]["bias"].float())


def read_and_written(model, tmp_path, family, file=None):
    opened = NunchakuFile(write(tmp_path, file or model.file))
    assert opened.family == family
    layers = {name: opened.layer(name) for name in opened.specs}
    assert losses(opened.specs, family) == {}
    assert (
        save(tmp_path / "again.safetensors", layers, {k: opened.tensor(k) for k in opened.rest}, family, {})
        == []
    )
    again = load_file(tmp_path / "again.safetensors")
    assert {k: t.shape for k, t in again.items()} == {k: t.shape for k, t in model.file.items()}
    assert [k for k, t in model.file.items() if not torch.equal(again[k], t)] == []
    return opened


def test_qwen_image(tmp_path):
    model = made.qwen_image()
    opened, own, x = read_and_written(model, tmp_path, "qwen_image"), model.natural, tokens(128)
    for joined, names in (
        ("to_qkv", ("to_q", "to_k", "to_v")),
        ("add_qkv_proj", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ):
        found = torch.cat([opened.layer(f"{D}attn.{name}")(x) for name in names], 1)
        assert relative_error(linear(x, own[f"{D}attn.{joined}"]), found) < 1e-5
    assert relative_error(modulation(x, own[f"{D}txt_mod.1"]), opened.layer(f"{D}txt_mod.1")(x)) < 1e-5
    after = gelu_tokens(512)
    assert (
        relative_error(
            linear(after, own[f"{D}img_mlp.net.2"], True), opened.layer(f"{D}img_mlp.net.2")(after)
        )
        < 1e-5
    )
    assert torch.equal(opened.tensor("txt_norm.weight"), model.file["txt_norm.weight"])


@pytest.mark.parametrize("refiners", [True, False])
def test_z_image(refiners, tmp_path):
    model = made.z_image(refiners=refiners)
    opened, x = read_and_written(model, tmp_path, "z_image"), tokens(128)
    with safe_open(tmp_path / "again.safetensors", "pt") as f:
        assert json.loads(f.metadata()["quantization_config"])["skip_refiners"] is not refiners
    y = linear(x, model.natural["layers.0.feed_forward.net.0.proj"])
    value, gate = y.chunk(2, 1)  # diffusers' SwiGLU: value * silu(gate); Z-Image's own: silu(w1 x) * w3 x
    assert relative_error(value, opened.layer("layers.0.feed_forward.w3")(x)) < 1e-5
    assert relative_error(gate, opened.layer("layers.0.feed_forward.w1")(x)) < 1e-5
    assert (
        relative_error(
            linear(x, model.natural["layers.0.attention.to_qkv"]), opened.layer("layers.0.attention.qkv")(x)
        )
        < 1e-5
    )
    assert not opened.specs["layers.0.feed_forward.w2"].parts[0].activation.unsigned
    if not refiners:
        w3, w1 = model.file["noise_refiner.0.feed_forward.net.0.proj.weight"].chunk(2)
        assert torch.equal(opened.tensor("noise_refiner.0.feed_forward.w1.weight"), w1)
        assert torch.equal(opened.tensor("noise_refiner.0.feed_forward.w3.weight"), w3)
        stacked = torch.cat([model.file[f"context_refiner.0.attention.to_{x}.weight"] for x in "qkv"])
        assert torch.equal(opened.tensor("context_refiner.0.attention.qkv.weight"), stacked)
        assert opened.shape("context_refiner.0.attention.qkv.weight") == (384, 128)


def test_sdxl(tmp_path):
    model = made.sdxl()
    opened, x = NunchakuFile(write(tmp_path, made.old_names(model.file, modules=False))), tokens(128)
    theirs = "down_blocks.1.attentions.0.transformer_blocks.0."
    ours = next(
        name for name in opened.specs if name.startswith("input_blocks") and name.endswith("attn1.to_q")
    ).removesuffix("attn1.to_q")
    found = torch.cat([opened.layer(f"{ours}attn1.to_{c}")(x) for c in "qkv"], 1)
    assert relative_error(linear(x, model.natural[f"{theirs}attn1.to_qkv"]), found) < 1e-5
    for name in ("attn2.to_q", "ff.net.0.proj"):
        assert relative_error(linear(x, model.natural[theirs + name]), opened.layer(ours + name)(x)) < 1e-5
    assert torch.equal(opened.tensor(f"{ours}attn2.to_k.weight"), model.file[f"{theirs}attn2.to_k.weight"])
    assert len(opened.specs) == 16
    assert opened.notes == ()
    assert set(losses(opened.specs, "sdxl")) == set(opened.specs)
