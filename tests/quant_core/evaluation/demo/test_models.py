"""The small models: what all of them have in common, and which of them `nibble demo` shows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comfyui_nibble.quant_core.evaluation.demo import run
from comfyui_nibble.tests.support import nibble

WHAT = {
    "landscapes": "landscapes, a small FLUX",
    "shapes": "shapes, a small FLUX",
    "shields": "shields, a small PixArt",
}


@pytest.mark.parametrize("name", run.MODELS)
def test_every_model_has_the_same_interface(name):
    small = run.MODELS[name]
    state = load_file(small.checkpoint)
    again = small.from_diffusers(small.to_diffusers(state))
    assert set(again) == set(state)
    assert all(torch.equal(again[key].float(), value.float()) for key, value in state.items())
    assert all(torch.equal(v, state[k].float()) for k, v in small.with_outliers(state, 0.0).items())
    assert small.family.layers({key: tuple(value.shape) for key, value in state.items()})
    latents = small.sample(small.load(state), small.judged[:1], steps=2, seed=1)
    assert small.world.decode(latents).shape == (1, small.world.SIZE, small.world.SIZE, 3)
    assert torch.equal(latents, small.sample(small.load(), small.judged[:1], steps=2, seed=1))


@pytest.mark.parametrize("name", run.MODELS)
def test_demo_shows_the_model_that_it_is_told(name, tmp_path, monkeypatch):
    found, shown = [], torch.rand(4, 8, 8, 3)
    row = {"image_psnr_db": 30.0, "block_bits_per_weight": 4.0, "ssim": 1.0, "latent_psnr_db": 30.0,
           "high_frequency_ratio": 1.0, "layer_sqnr_db": {"mean": 1.0, "min": 1.0}, "bytes": 1,
           "quantize_seconds": 1.0}  # fmt: skip

    def measured(small, severity, folder, progress):
        found.append((small, severity))
        return {"reference": {}, "methods": {"rtn": row}}, {"reference": shown, "rtn": shown}

    monkeypatch.setattr(run, "run_severity", measured)
    result = nibble("demo", "--out", tmp_path, *([] if name == "landscapes" else ["--model", name]))
    assert found == [(run.MODELS[name], 0.4), (run.MODELS[name], 1.0)]
    assert result.startswith(f"{WHAT[name]}\n")
    assert json.loads(Path(tmp_path / "report.json").read_text())["model"] == WHAT[name]


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(AssertionError, match="photos"):
        nibble("demo", "--out", tmp_path, "--model", "photos")
    assert not list(tmp_path.iterdir())
