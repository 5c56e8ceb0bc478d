"""Long work on small things, for processes that are killed: functions of strings, that `runs` calls by their
names."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from comfyui_nibble.quant_core.calibration import calibrate
from comfyui_nibble.quant_core.calibration.plan import Input
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.evaluation.demo.run import calibrate_tiny
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint

WIDTH, SAMPLES = 512, 24


def calibration_of_flux(folder: str):
    """Calibrates the shipped FLUX, in two runs of two steps."""
    torch.set_grad_enabled(False)
    model = tiny_flux.load()
    plan = FLUX.layers({k: tuple(v.shape) for k, v in load_file(tiny_flux.CHECKPOINT).items()})
    model_hash = Checkpoint(tiny_flux.CHECKPOINT).fingerprint()
    calibrate_tiny(model, plan, Path(folder), steps=2, samples=2, model_hash=model_hash)


def calibration(folder: str, steps: str = "12"):
    """Calibrates two layers of 512 channels over 24 samples."""
    torch.set_grad_enabled(False)
    layers = {name: torch.nn.Linear(WIDTH, WIDTH, bias=False) for name in "ab"}

    def run(sample, capture):
        for step in range(int(steps)):
            capture.at(step, float(step))
            g = torch.Generator().manual_seed(100 * sample + step)
            for layer in layers.values():
                layer(torch.randn(256, WIDTH, generator=g))

    inputs = [Input(name, WIDTH, ((0, WIDTH),), "block") for name in layers]
    calibrate(run, layers, inputs, Path(folder), {"model": "m", "steps": steps}, samples=SAMPLES, memory=1)
