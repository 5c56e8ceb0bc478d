"""nunchaku's NVFP4 files, against what random files hold in natural order (tests/assets/nunchaku.py)."""

import json

import pytest
import torch

from comfyui_nibble.quant_core.formats.nunchaku.read import NunchakuFile
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets import nunchaku as made
from comfyui_nibble.tests.assets.nunchaku import FP4, D, S, gelu_tokens, tokens, write
from comfyui_nibble.tests.support import relative_error, sqnr_db

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat([E2M1, -E2M1])  # of codes 0 to 15
Q = f"{D}attn.to_qkv"


@pytest.fixture(scope="module")
def fp4():
    return made.flux(fp4=True)


def rounded_weight(own):
    """(N, K) of smoothed channels, fp32: each code's value times its three scales."""
    codes, micro = own["codes"], own["micro"].float().repeat_interleave(16, 1)
    return VALUES[codes] * micro * own["outer"].float()[:, None]


def weight(own):
    """(N, K) that the module applies to x, low rank included."""
    return rounded_weight(own) / own["smooth"].float() + own["up"].float() @ own["down"].float().T


def theirs(x, own):
    """y of a W4A4 module as nunchaku computes it, without its 16-bit roundings: x (M, K), fp32."""
    smoothed = (x / own["smooth"].float()).unflatten(1, (-1, 16))
    scale = (smoothed.abs().amax(-1, keepdim=True) / 6).clamp(max=448)
    near = (smoothed / scale).unsqueeze(-1) - VALUES
    rounded = VALUES[near.abs().argmin(-1)] * scale.to(torch.float8_e4m3fn).float()
    return rounded.flatten(1) @ rounded_weight(own).T + beside(x, own)


def beside(x, own):
    low = x @ own["down"].float() @ own["up"].float().T
    return low + (own["bias"].float() if "bias" in own else 0)


def test_every_weight_is_the_files_own(fp4, tmp_path):
    opened, own = NunchakuFile(write(tmp_path, made.old_names(fp4.file), FP4)), fp4.natural
    both = {
        "single_blocks.0.linear1": torch.cat([weight(own[f"{S}attn.to_qkv"]), weight(own[f"{S}mlp_fc1"])]),
        "single_blocks.0.linear2": torch.cat([weight(own[f"{S}attn.to_out"]), weight(own[f"{S}mlp_fc2"])], 1),
    }
    alone = {
        "img_attn.qkv": "attn.to_qkv",
        "txt_attn.qkv": "attn.add_qkv_proj",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    }
    both |= {f"double_blocks.0.{name}": weight(own[f"{D}{module}"]) for name, module in alone.items()}
    assert set(both) == {name for name, spec in opened.specs.items() if not spec.weight_only}
    for name, wanted in both.items():
        assert relative_error(wanted, opened.layer(name).dequantize()) < 1e-6, name
    assert opened.kind == "nunchaku SVDQuant NVFP4"
    assert opened.notes == ()
    assert opened.specs["double_blocks.0.img_mlp.2"].describe() == "W4A4 nvfp4 smooth r16"
    assert opened.specs["single_blocks.0.modulation.lin"].describe().startswith("W4A16 g64")


def test_activations_are_no_further_off_than_nunchakus(fp4, tmp_path):
    """The token's own scale above the e4m3 ones is finer; behind GELU there is no shift."""
    opened = NunchakuFile(write(tmp_path, fp4.file, FP4))
    for name, module, x in (
        ("double_blocks.0.img_attn.qkv", Q, tokens(128)),
        ("double_blocks.0.img_mlp.2", f"{D}ff.net.2", gelu_tokens(512)),
    ):
        own = fp4.natural[module]
        exact = x @ rounded_weight(own | {"smooth": 1}).div(own["smooth"].float()).T + beside(x, own)
        ours, nunchakus = opened.layer(name)(x), theirs(x, own)
        assert sqnr_db(exact, ours) > sqnr_db(exact, nunchakus)
        assert sqnr_db(exact, ours) > 20
        # Two roundings of one x, independent at worst.
        assert relative_error(nunchakus, ours) < 2**0.5 * relative_error(exact, nunchakus)


def test_small_tokens_are_not_zeros(fp4, tmp_path):
    """Below 6 * 2^-10 nunchaku's e4m3 scale is 0; a token's own scale keeps what is there."""
    opened = NunchakuFile(write(tmp_path, fp4.file, FP4))
    own, x = fp4.natural[f"{D}attn.to_out.0"], tokens(128) * 1e-4
    assert torch.equal(theirs(x, own), beside(x, own))
    layer = opened.layer("double_blocks.0.img_attn.proj")
    exact = x @ rounded_weight(own).div(own["smooth"].float()).T
    assert sqnr_db(exact, layer(x) - beside(x, own)) > 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_outer_scales_multiply(dtype, tmp_path):
    model = made.flux(fp4=True)
    own, tensor = model.natural[Q], torch.tensor(0.75)
    for value in (tensor, tensor[None].to(dtype), tensor[None]):
        opened = NunchakuFile(write(tmp_path, model.file | {f"{Q}.wtscale": value}, FP4))
        wanted = weight(own | {"outer": own["outer"].float() * 0.75})
        assert relative_error(wanted, opened.layer("double_blocks.0.img_attn.qkv").dequantize()) < 1e-6


def test_without_any_outer_scale_it_is_one(fp4, tmp_path):
    file = {k: t for k, t in fp4.file.items() if not k.endswith(("wcscales", "wtscale"))}
    layer = NunchakuFile(write(tmp_path, file, FP4)).layer("double_blocks.0.txt_mlp.0")
    wanted = weight(fp4.natural[f"{D}ff_context.net.0.proj"] | {"outer": torch.ones(1)})
    assert relative_error(wanted, layer.dequantize()) < 1e-6


def test_tensors_tell_where_a_header_does_not(fp4, tmp_path):
    opened = NunchakuFile(write(tmp_path, fp4.file, {}))
    assert opened.kind == "nunchaku SVDQuant NVFP4"
    assert opened.specs == NunchakuFile(write(tmp_path / "said", fp4.file, FP4)).specs


@pytest.mark.parametrize("maker", [made.qwen_image, made.z_image, made.sdxl])
def test_rows_that_other_models_stack(maker, tmp_path):
    model = maker(fp4=True)
    opened = NunchakuFile(write(tmp_path, model.file, FP4))
    stacked = {
        "qwen_image": (Q, [f"{D}attn.to_{x}" for x in "qkv"]),
        "z_image": (
            "layers.0.feed_forward.net.0.proj",
            ["layers.0.feed_forward.w3", "layers.0.feed_forward.w1"],
        ),
        "sdxl": (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv",
            [f"middle_block.1.transformer_blocks.0.attn1.to_{x}" for x in "qkv"],
        ),
    }
    module, names = stacked[maker.__name__]
    found = torch.cat([opened.layer(name).dequantize() for name in names])
    assert relative_error(weight(model.natural[module]), found) < 1e-6


def test_rows_with_a_smoothing_of_their_own(tmp_path):
    model = made.flux(one_smoothing=False, fp4=True)
    opened = NunchakuFile(write(tmp_path, model.file, FP4))
    wanted = weight(model.natural[f"{S}mlp_fc1"])
    decibels = sqnr_db(wanted, opened.layer("single_blocks.0.linear1").dequantize()[384:])
    assert decibels > 15
    assert opened.notes[0].endswith(f"({decibels:.1f} dB of its weight)")


def header(**changes):
    config = json.loads(FP4["quantization_config"])
    config["weight"] |= changes
    return {"quantization_config": json.dumps(config)}


@pytest.mark.parametrize("scales", [None, "fp8_e4m3_nan", [None, "sfp8_e4m3_nan"], [None]])
def test_other_words_for_the_same_scales(scales, fp4, tmp_path):
    opened = NunchakuFile(write(tmp_path, fp4.file, header(scale_dtype=scales)))
    assert opened.kind == "nunchaku SVDQuant NVFP4"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (header(group_size=32), "group_size: expected 16 with 'fp4_e2m1_all', found 32"),
        (header(group_size=32, scale_dtype="ue8m0"), "group_size: expected 16"),
        (header(scale_dtype=3), "scale_dtype: expected .* found 3"),
        (
            header(scale_dtype=[None, "fp8_e8m0"]),
            r"scale_dtype: expected \[None, 'fp8_e4m3_nan'\] with 'fp4_e2m1_all', found \[None, 'fp8_e8m0'\]",
        ),
        (header(dtype="int4", group_size=64, scale_dtype=None), "dtype is 'int4', but .* as only files of"),
    ],
)
def test_headers_that_contradict(metadata, message, fp4, tmp_path):
    path = write(tmp_path, fp4.file, metadata)
    with pytest.raises(CheckpointError, match=message) as error:
        NunchakuFile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.pop(f"{Q}.wcscales"),
            rf"{Q}.wscales: expected wcscales or wtscale beside it as .* has, found neither",
        ),
        (
            lambda f: f.pop(f"{D}ff.net.2.wtscale"),
            rf"{D}ff.net.2.wscales: expected wcscales or wtscale beside it as .* has, found neither",
        ),
        (lambda f: f.pop(f"{Q}.wscales"), rf"{Q} is a quantized layer, but its tensor wscales is missing"),
        (
            lambda f: f.update({f"{Q}.wscales": f[f"{Q}.wscales"].bfloat16()}),
            f"{Q}.wscales: expected the dtype F8_E4M3, found BF16",
        ),
        (
            lambda f: f.update({f"{Q}.wscales": f[f"{Q}.wscales"].view(torch.float8_e5m2)}),
            f"{Q}.wscales: expected the dtype F8_E4M3, found F8_E5M2",
        ),
        (
            lambda f: f.update({f"{Q}.wscales": f[f"{Q}.wscales"].T.contiguous()}),
            rf"{Q}.wscales: expected the shape \(8, 384\) of its qweight's layer, found \(384, 8\)",
        ),
        (
            lambda f: f.update({f"{Q}.wcscales": f[f"{Q}.wcscales"][:128]}),
            rf"{Q}.wcscales: expected the shape \(384,\) of its qweight's layer, found \(128,\)",
        ),
        (
            lambda f: f.update({f"{Q}.wcscales": f[f"{Q}.wcscales"].to(torch.float8_e4m3fn)}),
            f"{Q}.wcscales: expected the dtype BF16 or F16, found F8_E4M3",
        ),
        (
            lambda f: f.update({f"{D}ff.net.2.wtscale": torch.ones(2)}),
            rf"{D}ff.net.2.wtscale: expected one number, found \(2,\)",
        ),
        (
            lambda f: f.update({f"{D}ff.net.2.wtscale": torch.ones(1, dtype=torch.float64)}),
            f"{D}ff.net.2.wtscale: expected the dtype BF16 or F16 or F32, found F64",
        ),
        (
            lambda f: f.update({f"{D}norm1.linear.wtscale": torch.ones(1)}),
            f"{D}norm1.linear.wtscale: expected no such tensor of {D}norm1.linear, found one",
        ),
    ],
)
def test_damage_is_named(change, message, fp4, tmp_path):
    file = dict(fp4.file)
    change(file)
    path = write(tmp_path, file, FP4)
    with pytest.raises(CheckpointError, match=message) as error:
        NunchakuFile(path)
    assert str(path) in str(error.value)


def damaged(fp4, tmp_path, leaf, byte):
    """The file with a byte of a module's e4m3 scales put in place."""
    scales = fp4.file[f"{Q}.{leaf}"].view(torch.uint8).clone()
    scales[3, 5] = byte
    return NunchakuFile(write(tmp_path, fp4.file | {f"{Q}.{leaf}": scales.view(torch.float8_e4m3fn)}, FP4))


def test_nan_among_scales(fp4, tmp_path):
    name = "double_blocks.0.img_attn.qkv"
    NunchakuFile(write(tmp_path, fp4.file, FP4)).sound_layer(name)
    opened = damaged(fp4, tmp_path / "nan", "wscales", 0x7F)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_scale: NaN or Inf\. The file is damaged"):
        opened.sound_layer(name)
    file = fp4.file | {f"{D}ff.net.2.wtscale": torch.full((1,), torch.inf)}
    with pytest.raises(CheckpointError, match=r"img_mlp\.2\.outer_scale: NaN or Inf"):
        NunchakuFile(write(tmp_path / "inf", file, FP4)).sound_layer("double_blocks.0.img_mlp.2")


def test_a_scale_below_zero(fp4, tmp_path):
    opened = damaged(fp4, tmp_path, "wscales", 0x81)
    with pytest.raises(
        CheckpointError, match=rf"{Q}\.wscales: expected scales of 0 or more, found a negative"
    ):
        opened.layer("double_blocks.0.img_attn.qkv")
