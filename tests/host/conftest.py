"""One real ComfyUI for all host tests. Without a checkout they skip."""

import shutil

import pytest

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.tests.assets.synthetic import flux_shapes, pixart_shapes, save_random
from comfyui_nibble.tests.host.inside import base, comfy, full, one_thread, outputs, packed, tiny_packed  # noqa: F401
from comfyui_nibble.tests.host.server import Server, find_comfyui

COMFYUI = find_comfyui()


def pytest_collection_modifyitems(items):
    if COMFYUI is None:
        skip = pytest.mark.skip(
            reason="no ComfyUI: set COMFYUI_PATH to a checkout of ComfyUI 0.31 or newer, or clone it to "
            "~/comfy/ComfyUI"
        )
        for item in items:
            if "tests/host" in str(item.path).replace("\\", "/"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    started = Server(COMFYUI, folder)
    models = folder / "models" / "diffusion_models"
    shutil.copy(tiny_flux.CHECKPOINT, models / "tiny_flux.safetensors")
    save_random(models / "pixart.safetensors", pixart_shapes())
    with started:
        yield started


@pytest.fixture(scope="session")
def full_width_flux(server):
    """FLUX.1's own widths, one block of each kind, random weights: 0.5 G weights."""
    name = "flux_3072.safetensors"
    save_random(server.base / "models" / "diffusion_models" / name, flux_shapes())
    return name
