"""A LoRA on a quantized model acts, or is refused by name; packed bytes never change."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats import nibble
from comfyui_nibble.tests.codes import ROUNDING
from comfyui_nibble.tests.host.graphs import (
    FLUX_TINY,
    keep_codes,
    load_graph,
    node,
    quantize_graph,
    take_codes,
    took_codes,
)
from comfyui_nibble.tests.host.server import GraphError
from comfyui_nibble.tests.support import relative_error

H = 256


@pytest.fixture(scope="module")
def files(server, tiny_state):
    """A packed file, the same weights dequantized as a full-precision file (with 16-bit activations), and
    LoRAs."""
    server.run(quantize_graph(FLUX_TINY, method="svdquant_r", prefix="diffusion_models/lora"))
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g) * 0.12
    bfl = {}
    for name, (n, k) in {
        "double_blocks.0.img_attn.qkv": (3 * H, H),
        "double_blocks.0.txt_mlp.2": (H, 4 * H),
        "single_blocks.1.linear2": (H, 5 * H),
        "single_blocks.0.modulation.lin": (3 * H, H),
    }.items():
        bfl |= {
            f"diffusion_model.{name}.lora_A.weight": rand(8, k),
            f"diffusion_model.{name}.lora_B.weight": rand(n, 8),
        }
    diffusers = {}
    for name, (n, k) in {
        "transformer_blocks.0.attn.to_q": (H, H),
        "transformer_blocks.0.attn.to_v": (H, H),
        "single_transformer_blocks.0.proj_mlp": (4 * H, H),
        "single_transformer_blocks.0.attn.to_k": (H, H),
    }.items():
        diffusers |= {
            f"transformer.{name}.lora_A.weight": rand(8, k),
            f"transformer.{name}.lora_B.weight": rand(n, 8),
        }
    dora = bfl | {"diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(3 * H, 1)}
    loha = {
        f"diffusion_model.single_blocks.1.linear2.hada_{k}": t
        for k, t in {
            "w1_a": rand(H, 4),
            "w1_b": rand(4, 5 * H),
            "w2_a": rand(H, 4),
            "w2_b": rand(4, 5 * H),
        }.items()
    }
    for name, tensors in {"bfl": bfl, "diffusers": diffusers, "dora": dora, "loha": loha}.items():
        save_file(tensors, server.base / "models" / "loras" / f"{name}.safetensors")
    return "lora_00001_.safetensors"


def lora(name, strength, model="load"):
    return node(
        "LoraLoaderModelOnly", model=[model, 0], lora_name=f"{name}.safetensors", strength_model=strength
    )


def sample(server, graph):
    return server.latents(server.run(graph), "out")


def on_its_codes(server, graph):
    """As `sample`, on the codes that were kept last."""
    outputs = server.run(take_codes(graph))
    took_codes(outputs)
    return server.latents(outputs, "out")


def in_full_precision(graph, *_):
    graph["load"] = node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default")
    return graph


@pytest.mark.parametrize("style", ["bfl", "diffusers"])
def test_stock_loader_acts_as_on_the_full_model(server, files, style):
    """The quantized model moves with the LoRA the way the full-precision model does."""
    path = server.base / "output" / "diffusion_models" / files
    before = path.read_bytes()
    # One step: over many, the two trajectories part for reasons that are not the LoRA's.
    plain, patched = (
        (lambda **extra: load_graph(FLUX_TINY, files, sample_steps=1, **extra)),
        {"model": lora(style, 1.0)},
    )
    base, moved = sample(server, plain()), sample(server, plain(**patched))
    full_base, full_moved = (
        sample(server, in_full_precision(plain())),
        sample(server, in_full_precision(plain(**patched))),
    )
    effect, full_effect = moved - base, full_moved - full_base
    assert relative_error(full_base, full_moved) > 0.1
    # What is left is quantization noise, which differs between the two inputs: 0.97 and 0.93 measured.
    assert torch.nn.functional.cosine_similarity(effect.flatten(), full_effect.flatten(), dim=0) > 0.9
    assert 0.85 < (effect * full_effect).sum() / full_effect.square().sum() < 1.15
    assert path.read_bytes() == before
    assert torch.equal(sample(server, plain(model=lora(style, 0.0))), base)


def test_stacked_loras_with_opposite_strengths_cancel(server, files):
    """To the rounding of float additions."""
    plain = lambda **extra: load_graph(FLUX_TINY, files, sample_steps=1, **extra)
    base = sample(server, keep_codes(plain()))
    assert relative_error(base, sample(server, plain(model=lora("bfl", 0.8)))) > 0.1
    assert (
        relative_error(
            base, on_its_codes(server, plain(first=lora("bfl", 0.8), model=lora("bfl", -0.8, "first")))
        )
        < ROUNDING
    )


def test_lora_and_base_in_one_graph_do_not_mix(server, files):
    graph = load_graph(FLUX_TINY, files, with_lora=lora("bfl", 1.0))
    graph["sample_lora"] = {
        "class_type": "KSampler",
        "inputs": graph["sample"]["inputs"] | {"model": ["with_lora", 0]},
    }
    graph["out_lora"] = node("SaveLatent", samples=["sample_lora", 0], filename_prefix="both")
    outputs = server.run(graph)
    assert torch.equal(server.latents(outputs, "out"), sample(server, load_graph(FLUX_TINY, files)))
    assert torch.equal(
        server.latents(outputs, "out_lora"),
        sample(server, load_graph(FLUX_TINY, files, model=lora("bfl", 1.0))),
    )


@pytest.mark.parametrize("name", ["dora", "loha"])
def test_other_adapters_act_as_on_the_full_model(server, files, name):
    plain = lambda **extra: load_graph(FLUX_TINY, files, sample_steps=1, **extra)
    effect = sample(server, plain(model=lora(name, 0.5))) - sample(server, plain())
    full_effect = sample(server, in_full_precision(plain(model=lora(name, 0.5)))) - sample(
        server, in_full_precision(plain())
    )
    # 0.98 measured for both; what is left is quantization noise.
    assert torch.nn.functional.cosine_similarity(effect.flatten(), full_effect.flatten(), dim=0) > 0.9
    assert 0.85 < (effect * full_effect).sum() / full_effect.square().sum() < 1.15


def hooked(graph, name, strength=1.0, frames=()):
    """The positive conditioning of a graph with a hook LoRA on it; frames: (strength, start) of a
    schedule."""
    graph |= {
        "hook": node("CreateHookLoraModelOnly", lora_name=f"{name}.safetensors", strength_model=strength),
        "hooked": node("PairConditioningSetProperties", positive_NEW=["prompt", 0],
        negative_NEW=["prompt", 0], strength=1.0, set_cond_area="default", hooks=["hook", 0]),
    }  # fmt: skip
    for i, (value, start) in enumerate(frames):
        graph[f"frame{i}"] = node("CreateHookKeyframe", strength_mult=value, start_percent=start)
        if i:
            graph[f"frame{i}"]["inputs"]["prev_hook_kf"] = [f"frame{i - 1}", 0]
    if frames:
        graph["scheduled"] = node(
            "SetHookKeyframes", hooks=["hook", 0], hook_kf=[f"frame{len(frames) - 1}", 0]
        )
        graph["hooked"]["inputs"]["hooks"] = ["scheduled", 0]
    graph["sample"]["inputs"] |= {"positive": ["hooked", 0], "negative": ["hooked", 1]}
    return graph


def test_hook_lora_equals_the_loader(server, files):
    want = sample(server, keep_codes(load_graph(FLUX_TINY, files, model=lora("bfl", 0.8))))
    assert (
        relative_error(want, on_its_codes(server, hooked(load_graph(FLUX_TINY, files), "bfl", 0.8)))
        < ROUNDING
    )
    assert relative_error(want, sample(server, load_graph(FLUX_TINY, files))) > 0.1


def test_schedule_is_honoured(server, files):
    """Off in the first half of the steps, on in the second: as two samplers in a row, and unlike on or off
    throughout."""
    steps, half = 8, node("KSamplerAdvanced")
    frames = [(0.0, 0.0), (1.0, 0.5)]
    got = sample(
        server, keep_codes(hooked(load_graph(FLUX_TINY, files, sample_steps=steps), "bfl", 1.0, frames))
    )
    shared = {
        k: v
        for k, v in load_graph(FLUX_TINY, files)["sample"]["inputs"].items()
        if k not in ("seed", "denoise", "latent_image", "steps", "model")
    }
    half["inputs"] = shared | {"noise_seed": 3, "steps": steps}
    first = {
        "inputs": half["inputs"]
        | {
            "model": ["load", 0],
            "add_noise": "enable",
            "latent_image": ["latent", 0],
            "start_at_step": 0,
            "end_at_step": steps // 2,
            "return_with_leftover_noise": "enable",
        }
    }
    second = {
        "inputs": half["inputs"]
        | {
            "model": ["with_lora", 0],
            "add_noise": "disable",
            "latent_image": ["first", 0],
            "start_at_step": steps // 2,
            "end_at_step": 1000,
            "return_with_leftover_noise": "disable",
        }
    }
    graph = load_graph(FLUX_TINY, files, with_lora=lora("bfl", 1.0), first=half | first, second=half | second)
    del graph["sample"]
    graph["out"]["inputs"]["samples"] = ["second", 0]
    outputs = server.run(take_codes(take_codes(graph, "first"), "second", start=steps // 2))
    took_codes(outputs, "first")
    took_codes(outputs, "second")
    assert relative_error(server.latents(outputs, "out"), got) < ROUNDING
    assert relative_error(sample(server, load_graph(FLUX_TINY, files, model=lora("bfl", 1.0))), got) > 0.05
    assert relative_error(sample(server, load_graph(FLUX_TINY, files)), got) > 0.05


def test_merge_into_a_quantized_model_is_refused(server, files):
    graph = load_graph(
        FLUX_TINY, files, full=node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default"),
        model=node("ModelMergeSimple", model1=["load", 0], model2=["full", 0], ratio=0.5),
    )  # fmt: skip
    with pytest.raises(GraphError, match="a merge with another model"):
        server.run(graph)


def test_merge_from_a_quantized_model_sees_real_values(server, files):
    """ratio 0 takes all from the second model: the quantized weights, dequantized."""
    graph = load_graph(
        FLUX_TINY, files, full=node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default"),
        model=node("ModelMergeSimple", model1=["full", 0], model2=["load", 0], ratio=0.0),
    )  # fmt: skip
    full = sample(server, in_full_precision(load_graph(FLUX_TINY, files)))
    assert relative_error(full, sample(server, graph)) < 0.25


def test_lora_before_quantize_is_merged(server, files):
    graph = quantize_graph(
        FLUX_TINY, method="svdquant", samples=4, steps=4, prefix="diffusion_models/merged", sample_steps=1
    )
    graph["lora"] = lora("bfl", 1.0)
    for name in ("calibrate", "quantize", "full"):
        graph[name]["inputs"]["model"] = ["lora", 0]
    outputs = server.run(graph)
    assert (
        relative_error(server.latents(outputs, "full_latent"), server.latents(outputs, "quantized_latent"))
        < 0.2
    )
    packed = nibble.PackFile(server.base / "output" / "diffusion_models" / "merged_00001_.safetensors")
    assert (
        packed.provenance["model"]
        != nibble.PackFile(server.base / "output" / "diffusion_models" / files).provenance["model"]
    )
    assert packed.family == "flux"


def test_save_refuses_a_lora_and_is_not_touched_by_one(server, files):
    graph = load_graph(
        FLUX_TINY,
        files,
        model=lora("bfl", 1.0),
        save=node("NibbleSaveModel", model=["model", 0], filename_prefix="diffusion_models/no"),
    )
    with pytest.raises(GraphError, match="4 layers carry LoRA patches"):
        server.run(graph)
