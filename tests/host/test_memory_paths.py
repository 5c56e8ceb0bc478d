"""The ways in which ComfyUI keeps a model in memory, with every kind of adapter: the latents are those of the
full load."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

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
from comfyui_nibble.tests.host.server import Server, find_comfyui
from comfyui_nibble.tests.host.test_adapters import LINEAR2, MLP, MODULATION, QKV, adapter, randn
from comfyui_nibble.tests.host.test_lora import hooked, lora
from comfyui_nibble.tests.support import relative_error

IN_16_BIT = {  # layers that are not quantized, so that ComfyUI's own way with LoRAs runs beside ours
    f"diffusion_model.{name}.lora_{side}.weight": randn(n, 4) if side == "up" else randn(4, k)
    for name, n, k in (("img_in", 256, 64), ("final_layer.adaLN_modulation.1", 512, 256))
    for side in ("up", "down")
}


@pytest.fixture(scope="module")
def file(server):
    """Name of a packed file; its adapters lie in models/loras as paths_*."""
    graph = quantize_graph(FLUX_TINY, method="svdquant", prefix="diffusion_models/paths")
    for name in ("calibrate", "prompts", "full", "full_latent", "quantized", "quantized_latent"):
        del graph[name]
    del graph["quantize"]["inputs"]["calibration"]
    server.run(graph)
    several = lambda kind, seed=0: (
        adapter(kind, QKV, seed) | adapter(kind, MLP, seed) | adapter(kind, MODULATION, seed)
    )
    for name, tensors in {
        "lora": several("lora") | IN_16_BIT,
        "second": several("lora", 5) | adapter("rank 1", LINEAR2),
        "dora": adapter("dora", MLP) | adapter("dora", LINEAR2) | IN_16_BIT,
        "lokr": several("lokr"),
        "diff": several("diff"),
        "bias": several("lora and bias") | IN_16_BIT | {"diffusion_model.img_in.diff_b": randn(256)},
    }.items():
        save_file(tensors, server.base / "models" / "loras" / f"paths_{name}.safetensors")
    return "paths_00001_.safetensors"


def bypassed(name, strength):
    return node(
        "LoraLoaderBypassModelOnly",
        model=["load", 0],
        lora_name=f"{name}.safetensors",
        strength_model=strength,
    )


ADAPTERS = {  # kind: a function of the file's name that makes a graph
    "none": lambda file: load_graph(FLUX_TINY, file, 2),
    **{
        k: lambda file, k=k: load_graph(FLUX_TINY, file, 2, model=lora(f"paths_{k}", 0.8))
        for k in ("lora", "dora", "lokr", "diff", "bias")
    },
    "two": lambda file: load_graph(
        FLUX_TINY, file, 2, first=lora("paths_lora", 0.8), model=lora("paths_second", -0.5, "first")
    ),
    "hook": lambda file: hooked(load_graph(FLUX_TINY, file, 2), "paths_lora", 0.8),
    "hook beside a LoRA": lambda file: hooked(
        load_graph(FLUX_TINY, file, 2, model=lora("paths_second", 0.8)), "paths_lora", 0.8
    ),
    "bypass": lambda file: load_graph(FLUX_TINY, file, 2, model=bypassed("paths_lora", 0.8)),
}
PATHS = {
    "a third fits": {"state": "normal", "share": 0.35},
    "two thirds fit": {"state": "normal", "share": 0.7},
    "--lowvram": {"state": "lowvram", "share": 0.5},
    "--novram": {"state": "novram", "share": 0.0},
    "half unloaded between two runs": {"state": "normal", "share": 2.0, "after_unload": 0.5},
    "most unloaded between two runs": {"state": "normal", "share": 2.0, "after_unload": 0.75},
}


def small_card(graph, path):
    """The graph with its sampler on a small card; "seen" says what was loaded."""
    stock = graph["sample"]["inputs"]
    kept = {k: stock[k] for k in ("model", "positive", "negative", "latent_image", "seed", "steps")}
    graph["sample"] = node("TestSmallCard", **(kept | {"after_unload": 0.0} | PATHS[path]))
    graph["seen"] = node("PreviewAny", source=["sample", 1])
    return graph


@pytest.fixture(scope="module")
def full_loads(server, file):
    """{adapter: latents of the stock sampler, which loads the model in full}; the codes are kept under the
    adapter's name."""
    return {
        kind: server.latents(server.run(keep_codes(make(file), name=kind)), "out")
        for kind, make in ADAPTERS.items()
    }


def test_the_adapters_do_something(full_loads):
    """Otherwise the table below compares nothing."""
    for kind, latents in full_loads.items():
        assert kind == "none" or relative_error(full_loads["none"], latents) > 0.02, kind


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_partial_loads_give_the_latents_of_the_full_load(server, file, full_loads, kind, path):
    disk = server.base / "output" / "diffusion_models" / file
    before = disk.read_bytes()
    graph = small_card(ADAPTERS[kind](file), path)
    # A bias is rounded once more where an adapter's is added at each call.
    outputs = server.run(take_codes(graph, positive=kind) if kind == "bias" else graph)
    seen = json.loads(outputs["seen"]["text"][0])
    assert seen["partial"]
    assert seen["loaded"] <= (0.6 if "unloaded" in path else PATHS[path]["share"])
    assert seen["packed bytes unchanged"]
    assert seen["adapters left"] == 0
    assert disk.read_bytes() == before
    latents = server.latents(outputs, "out")
    if kind == "bias":
        took_codes(outputs)
        assert relative_error(full_loads[kind], latents) < ROUNDING
    else:
        assert torch.equal(full_loads[kind], latents)


def test_offloading_on_two_streams(server, file, full_loads, tmp_path):
    """--async-offload keeps room for layers under way, so other layers stay. --lowvram, --novram and
    --highvram cannot stand beside
    --cpu at all, and with --enable-dynamic-vram beside it ComfyUI 0.33 does not start."""
    other = Server(find_comfyui(), tmp_path, options=("--async-offload", "2", "--disable-dynamic-vram"))
    shutil.copy(
        server.base / "output" / "diffusion_models" / file, tmp_path / "models" / "diffusion_models" / file
    )
    for name in ("lora", "second"):
        shutil.copy(
            server.base / "models" / "loras" / f"paths_{name}.safetensors", tmp_path / "models" / "loras"
        )
    with other:
        for kind in ("none", "lora", "hook beside a LoRA"):
            assert torch.equal(full_loads[kind], other.latents(other.run(ADAPTERS[kind](file)), "out"))
            for path in ("two thirds fit", "half unloaded between two runs"):
                outputs = other.run(small_card(ADAPTERS[kind](file), path))
                assert json.loads(outputs["seen"]["text"][0])["partial"]
                assert torch.equal(full_loads[kind], other.latents(outputs, "out"))
        assert "Using async weight offloading with 2 streams" in (tmp_path / "server.log").read_text()
