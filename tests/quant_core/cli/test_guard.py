"""`nibble guard` on the small FLUX: what it writes, what it leaves alone, what it refuses."""

import pytest
import torch

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.cli.guard import guard_file
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.precision.budget import BudgetError
from comfyui_nibble.quant_core.precision.guarding import Asked
from comfyui_nibble.quant_core.store.atomic import OverInput
from comfyui_nibble.tests.support import nibble

SOURCE = tiny_flux.CHECKPOINT


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, calibration):
    path = tmp_path_factory.mktemp("q") / "q.safetensors"
    nibble("quantize", SOURCE, path, "--method", "rtn", "--calibration", calibration)
    return path


def test_the_worst_are_raised_and_the_rest_has_the_same_bytes(tmp_path, calibration, quantized):
    before = PackFile(quantized)
    errors = {r["name"]: r["sqnr_db"] for r in before.report if r["sqnr_db"] is not None and r["nbytes"]}
    limit = sorted(errors.values())[3] + 1e-6  # four of them are below
    out = tmp_path / "g.safetensors"
    text = nibble(
        "guard",
        SOURCE,
        quantized,
        out,
        "--calibration",
        calibration,
        "--quality-db",
        limit,
        "--allow",
        "16 bit",
    )
    assert "4 of 12 measured layers raised: 4 to 16 bit" in text
    after = PackFile(out)
    raised = {name for name, db in errors.items() if db < limit and name not in after.specs}
    assert len(raised) == 4
    assert set(before.specs) - raised == set(after.specs)
    assert after.provenance["guard"][0]["raised"] == dict.fromkeys(raised, "16 bit")
    source = Checkpoint(SOURCE)
    for name in raised:
        assert torch.equal(after.tensor(f"{name}.weight"), source.get(f"{name}.weight").bfloat16())
    for name in after.specs:
        ours, theirs = before.layer(name).tensors, after.layer(name).tensors
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)


def test_bytes_that_may_be_spent(tmp_path, calibration, quantized):
    out = tmp_path / "g.safetensors"
    decision = guard_file(
        SOURCE, quantized, out, Calibration(calibration), Asked("memory", 0, allowed=("W4A8",))
    )
    assert decision.extra == 0
    assert set(decision.layers.values()) == {"W4A8"}
    eight = [p.activation.bits for s in PackFile(out).specs.values() for p in s.parts if p.activation]
    assert eight.count(8) >= len(decision.layers)


def test_what_it_refuses_before_anything_is_measured(tmp_path, calibration, quantized, monkeypatch):
    def begins(*args, **kwargs):
        raise AssertionError("a layer was measured before the refusal")

    monkeypatch.setattr("comfyui_nibble.quant_core.precision.guarding.measure", begins)
    statistics, asked = Calibration(calibration), Asked("quality", 24.0)
    out = tmp_path / "g.safetensors"
    with pytest.raises(OverInput, match=r"q.safetensors: is read by this command"):
        guard_file(SOURCE, quantized, quantized, statistics, asked)
    with pytest.raises(BudgetError, match="must be an SQNR above 0 dB, found -1"):
        guard_file(SOURCE, quantized, out, statistics, Asked("quality", -1.0))
    with pytest.raises(ValueError, match=r"m.safetensors is \w+. Name the full-precision model"):
        guard_file(_other(tmp_path), quantized, out, statistics, asked)
    run = ("guard", SOURCE, quantized, out, "--calibration", calibration)
    with pytest.raises(ValueError, match="give one of the two"):
        nibble(*run, "--quality-db", 20, "--memory-mb", 1)
    with pytest.raises(ValueError, match="--allow W3A3: choose of W4A8, W8A8, 16 bit"):
        nibble(*run, "--allow", "W3A3")
    assert not out.exists()


def _other(folder):
    from safetensors.torch import load_file, save_file

    state = {key: tensor + 0.01 for key, tensor in load_file(SOURCE).items()}
    save_file(state, folder / "m.safetensors")
    return folder / "m.safetensors"
