"""A real ComfyUI under random graphs. NIBBLE_SOAK=100 sets their number, NIBBLE_SOAK_SEED another run; `-s`
shows the figures."""

import os
import shutil
import sys
import time

import pytest

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.tests.host.server import Server, find_comfyui
from comfyui_nibble.tests.reliability import soak

COUNT, SEED = int(os.environ.get("NIBBLE_SOAK", 24)), int(os.environ.get("NIBBLE_SOAK_SEED", 0))
pytestmark = [
    pytest.mark.skipif(
        find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH to a checkout of ComfyUI 0.31 or newer"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(server, its figures, its TMPDIR) after the run."""
    base, scratch = tmp_path_factory.mktemp("soak"), tmp_path_factory.mktemp("scratch")
    server = Server(find_comfyui(), base)
    shutil.copy(tiny_flux.CHECKPOINT, base / "models" / "diffusion_models" / "tiny_flux.safetensors")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TMPDIR", str(scratch))
        server.__enter__()
    try:
        started = time.monotonic()
        found = soak.run(server, COUNT, SEED, every=10 if COUNT >= 50 else 6)
        print(f"\n{found.text(time.monotonic() - started)}")
        yield server, found, scratch
    finally:
        server.__exit__()


def test_no_graph_ends_other_than_it_should(done):
    server, found, _ = done
    assert found.unexpected == []
    assert server.process.poll() is None
    assert sum(found.graphs.values()) >= COUNT


def test_latents_repeat_bit_for_bit(done):
    _, found, _ = done
    assert found.repeated >= 3 * (len(found.held) - 1)


def test_memory_after_free_does_not_grow(done):
    """By 128 KiB and 2 kB a graph of tensors and the like, where 50 graphs took 60 kB and 144 took 49, and by
    500 blocks of Python's a graph, where they took 237: ComfyUI's log and its URLs."""
    _, found, _ = done
    first, last, graphs = found.held[0], found.held[-1], sum(found.graphs.values())
    assert last.allocated <= first.allocated + 2**17 + 2_000 * graphs, [h.allocated for h in found.held]
    assert last.blocks <= first.blocks + 500 * graphs, [h.blocks for h in found.held]


def test_descriptors_and_maps_are_flat(done):
    _, found, _ = done
    first, last = found.held[0], found.held[-1]
    assert last.descriptors <= first.descriptors + 2, found.held
    assert last.maps <= 1.02 * first.maps + 8, found.held
    assert last.files <= first.files + 1, (
        found.held
    )  # the LoRA that was read last stays mapped, and may be another's beside


def test_no_temporary_file_is_left(done):
    server, _, scratch = done
    assert soak.left_over(server, scratch) == []
