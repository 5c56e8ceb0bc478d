"""Nibble Quantize with training, on the small FLUX as ComfyUI loads it."""

import shutil

import pytest
import torch

from comfyui_nibble.quant_core.calibration.file import Calibration, merge
from comfyui_nibble.quant_core.training import presets, trainer
from comfyui_nibble.quant_core.training.reconstruct import TrainConfig
from comfyui_nibble.tests.host.inside import load, sample
from comfyui_nibble.tests.support import relative_error

SAMPLES, STEPS = 3, 3


@pytest.fixture(scope="module")
def model(comfy, tiny_state):
    """Loaded under inference mode, as in a graph."""
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))


@pytest.fixture(scope="module")
def calibration(model, one_thread, tmp_path_factory):
    import folder_paths

    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    g = torch.Generator().manual_seed(1)
    prompt = [
        [
            torch.randn(1, 8, 128, generator=g),
            {"pooled_output": torch.randn(1, 128, generator=g), "guidance": 3.5},
        ]
        for _ in range(2)
    ]
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    with torch.inference_mode():
        made = NibbleCalibrate.execute(
            model, {"positive0": prompt}, latent, "euler", "simple", STEPS, 1.0, 1, SAMPLES, 4.0, False
        )
    return made.args[0]


@pytest.fixture(scope="module", autouse=True)
def short(one_thread):
    """Presets of a few steps, in blocks and in runs of blocks."""
    few = lambda *kinds: TrainConfig(kinds, steps=3, calls=2)
    made = presets.Preset(few("transform", "smooth"), few("scale", "bias", "rounding"), span=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS["splitquant"], "standard", made)
        yield


def quantize(model, calibration, training="standard"):
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    with torch.inference_mode():
        return NibbleQuantize.execute(model, "splitquant", 32, False, calibration, training).args


def codes(patcher):
    """Every tensor of the packed layers."""
    return {f"{name}.{k}": p.detach() for name, m in patcher.packed_layers() for k, p in m.named_parameters()}


@pytest.fixture(scope="module")
def trained(model, calibration):
    """(the model's parameters before, the trained model, its report)."""
    before = dict(load(model).model.named_parameters())
    made, text, _ = quantize(model, calibration)
    return before, made, text


def stores(calibration):
    return list(calibration.path.parent.glob(f"{calibration.path.name}.*.training"))


def test_trained_model_samples(model, calibration, trained):
    _, made, text = trained
    assert text.count("training trained") + text.count("training kept its start") == 12
    assert text.count("distillation trained") + text.count("distillation kept its start") == 12
    latents, full = sample(made), sample(model)
    assert torch.isfinite(latents).all()
    untrained = quantize(model, calibration, "none")[0]
    assert relative_error(full, latents) < 1.1 * relative_error(full, sample(untrained))
    ours, theirs = codes(made), codes(untrained)
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_full_model_is_as_it_was(comfy, model, trained):
    """Training replaces tensors of inference mode for its own time only: the same objects stand in the
    network again."""
    before, _, _ = trained
    assert not comfy.model_management.in_training
    after = dict(model.model.named_parameters())
    assert any(p.is_inference() for p in before.values())
    assert before.keys() == after.keys()
    assert all(after[name] is p for name, p in before.items())
    assert not any("forward" in m.__dict__ for m in model.model.diffusion_model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())


def test_interrupted_training_goes_on(comfy, model, calibration, trained, monkeypatch):
    """Stopped as a user does it, in the middle of a block's training and in that of a run of blocks."""
    want = codes(trained[1])
    for folder in stores(calibration):
        shutil.rmtree(folder)
    before, real = trained[0], trainer.train

    def stopping(at):
        seen = []

        def train(chain, run, students, modules, config, stream_of, checkpoint, on_step):
            seen.append(run)

            def step(i, loss):
                if len(seen) == at and i == 1:
                    comfy.model_management.interrupt_current_processing()
                return on_step(i, loss)

            return real(chain, run, students, modules, config, stream_of, checkpoint, step)

        return train, seen

    for at, done in (
        (2, 2),
        (3, 3),
    ):  # the second block; two blocks are left then, and the first run of blocks is the third
        train, seen = stopping(at)
        monkeypatch.setattr(trainer, "train", train)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            quantize(model, calibration)
        assert len(seen) == done
        assert all(p is before[name] for name, p in model.model.named_parameters())
        assert not any("forward" in m.__dict__ for m in model.model.diffusion_model.modules())
        assert list(stores(calibration)[0].glob("*.training"))  # the steps that were done
    monkeypatch.setattr(trainer, "train", real)
    got = codes(quantize(model, calibration)[0])
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_calibrations_without_recorded_calls(model, calibration, tmp_path):
    """As of version 0.3: refused before anything is quantized."""
    merge([calibration.path, calibration.path], tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="holds no recorded inputs of the network to train on"):
        quantize(model, Calibration(tmp_path / "old.safetensors"))
    with pytest.raises(ValueError, match="training needs a calibration, found none"):
        quantize(model, None)
