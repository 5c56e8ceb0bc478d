"""ComfyUI killed while Nibble Quantize works: the next run takes over the finished layers and ends with the
same model."""

import shutil
import time

import pytest
import torch

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.run.leftovers import leftovers
from comfyui_nibble.tests.assets.synthetic import pixart_shapes, save_random
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.host.server import Server, find_comfyui
from comfyui_nibble.tests.reliability.runs import size_of

COMFYUI = find_comfyui()
pytestmark = pytest.mark.skipif(
    COMFYUI is None, reason="no ComfyUI: set COMFYUI_PATH to a checkout, or clone it to ~/comfy/ComfyUI"
)
GRAPH = {
    "load": node("UNETLoader", unet_name="pixart.safetensors", weight_dtype="default"),
    "quantize": node("NibbleQuantize", model=["load", 0], method="svdquant", rank=32, gptq=False),
    "save": node("NibbleSaveModel", model=["quantize", 0], filename_prefix="diffusion_models/q"),
}


def test_killed_in_the_middle(tmp_path):
    server = Server(COMFYUI, tmp_path)
    save_random(tmp_path / "models" / "diffusion_models" / "pixart.safetensors", pixart_shapes(depth=4))
    pieces = lambda: list((tmp_path / "output" / "nibble_calibration").glob("*.partial/*.nibble.safetensors"))
    counts = []
    for i in range(size_of("NIBBLE_SERVER_KILLS", 1)):
        with server:
            server.submit(GRAPH)
            deadline = time.monotonic() + 120
            while len(pieces()) < 3 + 5 * i and time.monotonic() < deadline:
                time.sleep(0.005)
        counts.append(len(pieces()))
        assert counts[-1] >= 3 + 5 * i
        assert not list((tmp_path / "output").glob("diffusion_models/*.safetensors"))
    with server:
        server.run(GRAPH)
        assert f"{counts[-1]} finished pieces of the run since" in (tmp_path / "server.log").read_text()
        server.run(
            GRAPH
            | {
                "save": node(
                    "NibbleSaveModel", model=["quantize", 0], filename_prefix="diffusion_models/again"
                )
            }
        )
    one, two = (
        PackFile(tmp_path / "output" / "diffusion_models" / f"{name}_00001_.safetensors")
        for name in ("q", "again")
    )
    assert one.specs == two.specs
    for name in one.specs:
        assert all(torch.equal(t, two.layer(name).tensors[k]) for k, t in one.layer(name).tensors.items())
    assert not list(leftovers(tmp_path / "output"))
    shutil.rmtree(tmp_path / "output")
    print(f"{len(counts)} kills at {counts} finished layers, same tensors, 0 leftovers")
