"""A real ComfyUI in a folder of any name, with two copies of the pack and without Triton."""

import os

import pytest
import torch

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.tests.host.conftest import COMFYUI
from comfyui_nibble.tests.host.graphs import FLUX_TINY, load_graph, node, sampling
from comfyui_nibble.tests.host.server import Server
from comfyui_nibble.tests.support import copy_of_the_pack, relative_error

GRAPH = {
    "load": node("UNETLoader", unet_name=FLUX_TINY["model"], weight_dtype="default"),
    "latent": FLUX_TINY["latent"],
    "prompt": FLUX_TINY["prompt"],
    "quantize": node("NibbleQuantize", model=["load", 0], method="convrot", rank=0, gptq=False),
    "save": node("NibbleSaveModel", model=["quantize", 0], filename_prefix="diffusion_models/模型"),
}
for _name in ("load", "quantize"):
    GRAPH[f"{_name}_sample"] = sampling([_name, 0], ["prompt", 0], ["latent", 0], steps=4)
    GRAPH[f"{_name}_latent"] = node("SaveLatent", samples=[f"{_name}_sample", 0], filename_prefix=_name)


@pytest.fixture
def no_triton(tmp_path, monkeypatch):
    """As on macOS, or on a CPU where nobody installed it."""
    (tmp_path / "without" / "triton").mkdir(parents=True)
    (tmp_path / "without" / "triton" / "__init__.py").write_text("raise ImportError('no Triton here')\n")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])
    )


def test_two_copies_in_a_folder_outside_of_ascii_without_triton(tmp_path, no_triton):
    base = tmp_path / "AI绘画 ü"
    for name in ("ComfyUI-Nibble", "ComfyUI-Nibble 副本"):
        copy_of_the_pack(base / "custom_nodes" / name)
    (base / "models" / "diffusion_models").mkdir(parents=True)
    (base / "models" / "diffusion_models" / FLUX_TINY["model"]).symlink_to(tiny_flux.CHECKPOINT)
    with Server(COMFYUI, base, pack=False) as server:
        outputs = server.run(GRAPH)
        quantized = server.latents(outputs, "quantize_latent")
        assert relative_error(server.latents(outputs, "load_latent"), quantized) < 0.2
        (saved,) = (base / "output" / "diffusion_models").iterdir()
        loaded = server.latents(server.run(load_graph(FLUX_TINY, saved.name, sample_steps=4)), "out")
        assert torch.equal(loaded, quantized)
    log = (base / "server.log").read_text(encoding="utf-8")
    assert "IMPORT FAILED" not in log
    assert log.count("custom_nodes/ComfyUI-Nibble") == 2  # ComfyUI's own list of what it imported
