"""A calibration of the shipped model."""

import pytest
from safetensors.torch import load_file

from comfyui_nibble.quant_core.evaluation.demo import run, tiny_flux
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Statistics of the shipped model, tied to its fingerprint as the node does it."""
    state = load_file(tiny_flux.CHECKPOINT)
    layers = FLUX.layers({k: tuple(v.shape) for k, v in state.items()})
    fingerprint = Checkpoint(tiny_flux.CHECKPOINT).fingerprint()
    return run.calibrate_tiny(
        tiny_flux.load(), layers, tmp_path_factory.mktemp("c"), steps=4, samples=4, model_hash=fingerprint
    ).path
