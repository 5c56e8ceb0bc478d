"""Nibble Bake LoRA over HTTP: the LoRAs in the file."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.codes import EDGE, ROUNDING
from comfyui_nibble.tests.host.graphs import FLUX_TINY, keep_codes, load_graph, node, take_codes, took_codes
from comfyui_nibble.tests.host.server import GraphError
from comfyui_nibble.tests.host.test_adapters import LINEAR2, MLP, QKV, adapter, randn
from comfyui_nibble.tests.host.test_lora import files, lora, sample  # noqa: F401
from comfyui_nibble.tests.support import relative_error

FINAL = "diffusion_model.final_layer.linear"
BF16, BF16_EDGE = (
    2.0**-8,
    0.1,
)  # of a scale under DoRA's gain: its rounding, and what that moves the activations behind it by, in steps


@pytest.fixture(scope="module")
def stack(server, files):  # noqa: F811
    """Two LoRAs: one with DoRA and a bias difference, one that also has a layer in 16 bit; and a full-rank
    adapter."""
    one = adapter("dora", MLP) | adapter("lora and bias", QKV)
    two = adapter("loha", LINEAR2) | {
        f"{FINAL}.lora_up.weight": randn(64, 4),
        f"{FINAL}.lora_down.weight": randn(4, 256),
    }
    for name, tensors in {
        "one": one,
        "two": two,
        "full_rank": adapter("lokr", QKV) | adapter("diff", MLP),
    }.items():
        save_file(tensors, server.base / "models" / "loras" / f"bake_{name}.safetensors")
    return files


def baked(stack, rank=0, names=("one", "two"), **extra):
    graph = load_graph(
        FLUX_TINY, stack, sample_steps=1, **extra
    )  # over many steps, rounding parts the trajectories
    for i, name in enumerate(names):
        graph[f"lora{i}"] = lora(f"bake_{name}", 0.5, f"lora{i - 1}" if i else "load")
    last = f"lora{len(names) - 1}" if names else "load"
    graph["bake"] = node("NibbleBakeLora", model=[last, 0], rank=rank)
    graph["report"] = node("PreviewAny", source=["bake", 1])
    graph["save"] = node("NibbleSaveModel", model=["bake", 0], filename_prefix="diffusion_models/baked")
    graph["sample"]["inputs"]["model"] = ["bake", 0]
    return graph, last


def test_file_carries_its_loras(server, stack):
    graph, last = baked(stack)
    outputs = server.run(graph)
    latents, report = server.latents(outputs, "out"), outputs["report"]["text"][0]
    name = outputs["save"]["text"][0].split(":")[0]
    assert torch.equal(latents, sample(server, load_graph(FLUX_TINY, name, sample_steps=1)))
    graph["sample"]["inputs"]["model"] = [last, 0]
    with_loaders = sample(
        server,
        keep_codes({k: graph[k] for k in ("load", "latent", "prompt", "sample", "out", "lora0", "lora1")}),
    )
    base = sample(server, load_graph(FLUX_TINY, stack, sample_steps=1))
    assert relative_error(base, with_loaders) > 0.05
    outputs = server.run(take_codes(load_graph(FLUX_TINY, name, sample_steps=1)))
    took_codes(outputs, edge=BF16_EDGE)
    assert relative_error(with_loaders, server.latents(outputs, "out")) < BF16
    assert "3 quantized layers, every column kept" in report
    assert "1 tensors in 16 bit merged" in report
    folder = server.base / "output" / "diffusion_models"
    before, after = PackFile(folder / stack), PackFile(folder / name)
    for layer in before.specs:
        assert torch.equal(before.layer(layer).tensors["weight"], after.layer(layer).tensors["weight"])
    qkv, linear2 = (k.removeprefix("diffusion_model.") for k in (QKV, LINEAR2))
    assert after.specs[qkv].rank == before.specs[qkv].rank + 4
    assert after.specs[linear2].rank == before.specs[linear2].rank + 12
    assert after.provenance["lora"]["tensors"] == 5
    row = next(r for r in after.report if r["name"] == qkv)
    assert row["nbytes"] == after.layer(qkv).nbytes


def test_baked_model_takes_further_loras(server, stack):
    graph, _ = baked(stack, names=("one",))
    graph["more"] = lora("bake_two", 0.5, "bake")
    graph["sample"]["inputs"]["model"] = ["more", 0]
    twice, _ = baked(stack)
    want, outputs = sample(server, keep_codes(twice)), server.run(take_codes(graph))
    took_codes(outputs, edge=10 * EDGE)  # of a low rank that is put together once more
    assert relative_error(want, server.latents(outputs, "out")) < 10 * ROUNDING


def test_truncation_states_its_error(server, stack):
    report = server.run(baked(stack, rank=34)[0])["report"]["text"][0]
    assert "at most 34 columns a layer" in report
    assert "rank  32 ->  34" in report


def test_full_rank_adapters_need_a_rank(server, stack):
    with pytest.raises(
        GraphError,
        match=r"NibbleBakeLora: layer double_blocks.0.img_\S+: the adapter is of full rank .* Set rank to at "
        r"least 1",
    ):
        server.run(baked(stack, names=("full_rank",))[0])
    report = server.run(baked(stack, rank=64, names=("full_rank",))[0])["report"]["text"][0]
    assert "2 quantized layers" in report


def test_what_cannot_be_baked_is_named(server, stack):
    with pytest.raises(GraphError, match="there is no LoRA on this model"):
        server.run(baked(stack, names=())[0])
    graph, _ = baked(stack, names=("one",))
    graph["load"] = node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default")
    with pytest.raises(GraphError, match="was not quantized by Nibble"):
        server.run(graph)
    graph, _ = baked(stack, names=("one",))
    graph["lora0"]["class_type"] = "LoraLoaderBypassModelOnly"
    with pytest.raises(GraphError, match="LoraLoaderModelOnly"):
        server.run(graph)
