from itertools import groupby
from math import prod

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families import FAMILIES, FLUX, PIXART, Family, Part, detect
from comfyui_nibble.quant_core.families.chroma import CHROMA
from comfyui_nibble.quant_core.families.flux2 import FLUX2
from comfyui_nibble.quant_core.families.qwen_image import QWEN_IMAGE
from comfyui_nibble.quant_core.families.sd3 import SD3
from comfyui_nibble.quant_core.families.sdxl import SDXL
from comfyui_nibble.quant_core.families.wan import WAN
from comfyui_nibble.quant_core.families.z_image import Z_IMAGE
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.tests.assets.synthetic import (
    chroma_shapes,
    flux2_shapes,
    flux_shapes,
    pixart_shapes,
    sd3_shapes,
    sdxl_shapes,
    wan_shapes,
    z_image_shapes,
)

pytestmark = pytest.mark.quick


def test_flux_map_of_a_full_width_model():
    shapes = flux_shapes(double=2, single=1)
    layers = {layer.name: layer for layer in FLUX.layers(shapes)}
    assert detect(shapes) is FLUX
    assert list(layers)[:10] == [
        f"double_blocks.0.{n}"
        for n in (
            "img_mod.lin",
            "txt_mod.lin",
            "img_attn.qkv",
            "txt_attn.qkv",
            "img_attn.proj",
            "txt_attn.proj",
            "img_mlp.0",
            "txt_mlp.0",
            "img_mlp.2",
            "txt_mlp.2",
        )
    ]
    assert len(layers) == 2 * 10 + 3
    assert {n for n, layer in layers.items() if layer.weight_only} == {
        "double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin", "double_blocks.1.img_mod.lin", "double_blocks.1.txt_mod.lin", "single_blocks.0.modulation.lin",
    }  # fmt: skip
    linear2 = layers["single_blocks.0.linear2"]
    assert [(p.start, p.stop, p.after_gelu) for p in linear2.parts] == [(0, 3072, False), (3072, 15360, True)]
    assert layers["double_blocks.1.txt_mlp.2"].parts[0].after_gelu
    kept = {k.removesuffix(".weight") for k, s in shapes.items() if len(s) == 2} - set(layers)
    assert kept == {
        "img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer",
        "guidance_in.in_layer", "guidance_in.out_layer", "final_layer.linear", "final_layer.adaLN_modulation.1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("widths", "gigabytes", "share"),
    [
        ({"double": 8, "single": 48}, 64.45, 0.992),  # dev
        (
            {"double": 5, "single": 20, "hidden": 3072, "context": 7680, "guidance": False},
            7.75,
            0.986,
        ),  # Klein 4B
        (
            {"double": 8, "single": 24, "hidden": 4096, "context": 12288, "guidance": False},
            18.16,
            0.989,
        ),  # Klein 9B
    ],
)
def test_flux2_is_nearly_all_quantized(widths, gigabytes, share):
    shapes = flux2_shapes(**widths)
    layers = FLUX2.layers(shapes)
    whole = sum(prod(s) for s in shapes.values())
    assert detect(shapes) is FLUX2
    assert 2 * whole / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert sum(layer.in_features * layer.out_features for layer in layers) / whole == pytest.approx(
        share, abs=0.0005
    )


def test_flux2s_shared_modulation_comes_first_and_counts_to_the_first_block():
    hidden, layers = 256, FLUX2.layers(flux2_shapes(1, 1, hidden=256, context=64))
    names = [
        f"{name}.lin"
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ]
    assert (
        [layer.name for layer in layers if layer.weight_only] == [layer.name for layer in layers[:3]] == names
    )
    assert {layer.input for layer in layers[:3]} == {names[0]}
    assert list(dict.fromkeys(layer.block for layer in layers)) == ["double_blocks.0", "single_blocks.0"]
    # The MLP half of the last layer reads a product with a SiLU, not a GELU.
    assert layers[-1].parts == (Part(0, hidden), Part(hidden, 4 * hidden))


def test_blocks_are_in_numeric_order():
    shapes = flux_shapes(double=12, single=11, hidden=128)
    blocks = list(dict.fromkeys(layer.block for layer in FLUX.layers(shapes)))
    assert blocks == [f"double_blocks.{i}" for i in range(12)] + [f"single_blocks.{i}" for i in range(11)]


def test_pixart_map_shares_the_text():
    shapes = pixart_shapes(depth=3)
    layers = {layer.name: layer for layer in PIXART.layers(shapes)}
    assert detect(shapes) is PIXART
    assert [layer.name for layer in layers.values() if layer.rule] == ["t_block.1"]
    del layers["t_block.1"]
    assert len(layers) == 3 * 7
    assert {layers[f"blocks.{i}.cross_attn.kv_linear"].input for i in range(3)} == {
        "blocks.0.cross_attn.kv_linear"
    }
    assert layers["blocks.2.mlp.fc2"].parts[0].after_gelu
    assert not any(layer.weight_only for layer in layers.values())


def test_blocks_within_blocks_are_in_numeric_order():
    """A U-Net: input before middle before output, 4 before 10, a transformer's projections before its blocks."""
    blocks = ["input_blocks.4.1", "input_blocks.4.1.transformer_blocks.2", "input_blocks.4.1.transformer_blocks.10", "input_blocks.10.1",
              "middle_block.1.transformer_blocks.0", "output_blocks.0.1"]  # fmt: skip
    names = [f"{b}.{'attn2.to_k' if 'transformer' in b else 'proj_in'}" for b in blocks]
    layers = SDXL.layers({f"{name}.weight": (64, 64) for name in reversed(names)})
    assert [layer.name for layer in layers] == names
    assert [layer.block for layer in layers] == blocks
    # The first block that has such a layer stands for all.
    assert {layer.input for layer in layers if layer.name.endswith("to_k")} == {names[1]}


def test_z_images_blocks_are_in_the_order_of_the_forward_pass():
    blocks = dict.fromkeys(layer.block.split(".")[0] for layer in Z_IMAGE.layers(z_image_shapes()))
    assert list(blocks) == ["context_refiner", "noise_refiner", "layers"]


def test_sd3_keeps_the_last_blocks_short_modulation():
    names = [layer.name for layer in SD3.layers(sd3_shapes(2)) if layer.weight_only]
    assert names == [f"joint_blocks.{b}_block.adaLN_modulation.1" for b in ("0.context", "0.x", "1.x")]


def test_streams_of_layers():
    """Which of a block's outputs a layer's error goes into first, by the order in which ComfyUI returns them."""
    qwen, sd3 = Family.stream_of(QWEN_IMAGE.streams), Family.stream_of(SD3.streams)
    text = ("txt_mod.1", "attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj")
    image = ("img_mod.1", "attn.to_q", "attn.to_out.0", "img_mlp.net.2")
    assert (
        {qwen(f"transformer_blocks.11.{n}") for n in text}
        == {sd3("joint_blocks.3.context_block.mlp.fc1")}
        == {0}
    )
    assert (
        {qwen(f"transformer_blocks.11.{n}") for n in image}
        == {sd3("joint_blocks.3.x_block.attn2.qkv")}
        == {1}
    )


def test_what_a_variant_adds_is_left_to_the_rules():
    """HuMo attends to sound in each block, S2V in modules of their own; neither changes what the map says or
    the model's fingerprint."""
    plain = wan_shapes(2, dim=128)
    sound = {
        f"blocks.{i}.audio_cross_attn_wrapper.audio_cross_attn.{x}.weight": (128, 128)
        for i in range(2)
        for x in "qkvo"
    }
    injector = {f"audio_injector.injector.{i}.{x}.weight": (128, 128) for i in range(2) for x in "qkvo"}
    added = sound | injector | {"casual_audio_encoder.linear.weight": (128, 128)}
    layers = WAN.layers(plain | added)
    assert WAN.mapped(plain | added) == WAN.mapped(plain) == [layer for layer in layers if not layer.rule]
    assert {f"{layer.name}.weight" for layer in layers if layer.rule == "block"} == {*sound, *injector}
    assert [layer.name for layer in layers if layer.rule == "shared"] == ["time_projection.1"]
    # Blocks are contiguous, those of the map first.
    assert [block for block, _ in groupby(layers, key=lambda layer: layer.block)] == [
        "blocks.0", "blocks.1", "audio_injector.injector.0", "audio_injector.injector.1",
    ]  # fmt: skip


def test_what_a_map_keeps_is_not_taken_by_the_rules():
    kept = ("distilled_guidance_layer.", "nerf_blocks.")
    shapes = chroma_shapes(2, 2, radiance=True)
    assert all(any(name.startswith(stem) for name in shapes) for stem in kept)
    layers = CHROMA.layers(shapes)
    assert not [layer.name for layer in layers if layer.name.startswith(kept)]
    assert CHROMA.why_kept("distilled_guidance_layer.layers.0.in_layer") == "its errors reach every block"
    assert CHROMA.why_kept("nerf_blocks.3.param_generator").startswith(
        "makes the weights of the pixel decoder"
    )
    assert not any(layer.rule for layer in [*layers, *SD3.layers(sd3_shapes(2)), *SDXL.layers(sdxl_shapes())])


def test_relatives_are_not_taken_for_flux():
    shapes = flux_shapes(hidden=128)
    for relative in ("distilled_guidance_layer.in_proj.weight", "double_stream_modulation_img.lin.weight"):
        assert not FLUX.matches(shapes | {relative: (1, 1)})
    # Ovis-Image: a gated SiLU instead of a GELU, in both libraries' names.
    assert not FLUX.matches(shapes | {"double_blocks.0.img_mlp.gate_proj.weight": (1, 1)})


@pytest.mark.parametrize(
    "made", ["OvisImageTransformer2DModel", "LongCatImageTransformer2DModel", "Lumina2Transformer2DModel"]
)
def test_relatives_under_diffusers_names_belong_to_no_family(made):
    import diffusers

    arguments = {"num_layers": 2} | ({"num_single_layers": 1} if "Lumina" not in made else {})
    with torch.device("meta"):
        model = getattr(diffusers, made)(**arguments)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert not any(f.matches(shapes) or f.matches_diffusers(shapes) for f in FAMILIES)


def test_older_u_nets_are_not_taken_for_sdxl():
    shapes = sdxl_shapes()
    assert SDXL.matches(shapes)
    assert not SDXL.matches(
        shapes | {"input_blocks.1.1.proj_in.weight": (320, 320)}
    )  # SD 2 unCLIP, Stable Video Diffusion
    assert not SDXL.matches({k: s for k, s in shapes.items() if "label_emb" not in k})  # SD 1


def test_lumina_is_not_taken_for_z_image():
    shapes = {k.replace("adaLN_modulation.0", "adaLN_modulation.1"): s for k, s in z_image_shapes().items()}
    assert not Z_IMAGE.matches(shapes)


def test_flux_under_diffusers_names_is_the_same_model(tmp_path, tiny_state):
    """diffusers' own class takes the converted names, and the file reads back under ComfyUI's names bit for
    bit."""
    model = tiny_flux.build()
    converted = tiny_flux.to_diffusers(tiny_state)
    assert set(converted) == set(model.state_dict())
    folder = tmp_path / "transformer"
    folder.mkdir()
    keys = sorted(converted)
    save_file({k: converted[k].contiguous() for k in keys[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({k: converted[k].contiguous() for k in keys[1::2]}, folder / "model-00002-of-00002.safetensors")
    c = Checkpoint(folder)
    assert c.family is FLUX
    assert c.shapes == {k: tuple(v.shape) for k, v in tiny_state.items()}
    assert all(torch.equal(c.get(k), v) for k, v in tiny_state.items())
    save_file(tiny_state, tmp_path / "comfy.safetensors")
    assert c.fingerprint() == Checkpoint(tmp_path / "comfy.safetensors").fingerprint()


def test_pixart_under_diffusers_names():
    """Every tensor of diffusers' PixArt class is mapped, and every mapped layer has ComfyUI's shape."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_layers=2, num_attention_heads=16, attention_head_dim=72, sample_size=32, caption_channels=4096
        )
    theirs = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    mapped = PIXART.diffusers(theirs)
    used = {k for s in mapped.values() for k in s.keys}
    assert set(theirs) - used <= {"pos_embed.pos_embed"}
    ours = pixart_shapes(depth=2)
    for key, stacked in mapped.items():
        shape = (sum(theirs[k][0] for k in stacked.keys), *theirs[stacked.keys[0]][1:])
        if key in ours:
            assert shape == ours[key], key
    assert {layer.name + ".weight" for layer in PIXART.layers(ours)} <= set(mapped)
