"""`nibble quantize --wish` on the small FLUX: each wish makes what it says, and asks for what it needs."""

import pytest

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.precision.wish import WishError
from comfyui_nibble.tests.support import nibble

SOURCE = tiny_flux.CHECKPOINT


def test_fast_needs_no_calibration(tmp_path):
    out = tmp_path / "q.safetensors"
    text = nibble("quantize", SOURCE, out, "--wish", "fast")
    assert "Check: Not measured" in text
    made = PackFile(out)
    assert made.provenance["method"] == "svdquant_r"
    assert made.provenance["calibration"] is None
    assert len(made.specs) == 16


def test_best_raises_what_is_below_its_limit(tmp_path, calibration, monkeypatch):
    """At 30 dB in place of 24, which all layers of this model have."""
    monkeypatch.setattr("comfyui_nibble.quant_core.precision.wish.VERY_CLOSE", 30.0)
    out = tmp_path / "q.safetensors"
    text = nibble("quantize", SOURCE, out, "--wish", "best", "--calibration", calibration)
    assert "Good: Very close to the original: worst layer" in text
    made = PackFile(out)
    (guard,) = made.provenance["guard"]
    assert (guard["budget"], guard["limit"]) == ("quality", 30.0)
    assert guard["raised"]
    assert min(r["sqnr_db"] for r in made.report if r["sqnr_db"] is not None) >= 30
    below = [r for r in made.report if "was W4A4 at" in str(r["choices"]) + r["note"]]
    assert {r["name"] for r in below} == set(guard["raised"])


def test_smallest_mixes_two_methods(tmp_path, calibration):
    out = tmp_path / "q.safetensors"
    nibble("quantize", SOURCE, out, "--wish", "smallest", "--calibration", calibration)
    bits = {p.weight.bits for spec in PackFile(out).specs.values() for p in spec.parts if p.activation}
    assert bits == {2, 4}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--wish", "balanced"], "the wish balanced measures on example runs .* and no calibration is given"),
        (["--wish", "great"], "unknown wish 'great'. Wishes: balanced, fast, best, smallest, fits 6 GB"),
        (
            ["--wish", "fast", "--method", "rtn"],
            "chooses what --method sets: give one of the two",
        ),
        (["--wish", "fast", "--rank", "16"], "--wish fast chooses what --rank sets"),
        (["--wish", "fits 8 GB"], "this model takes .* as it is"),
    ],
)
def test_what_it_refuses(tmp_path, options, told):
    out = tmp_path / "q.safetensors"
    with pytest.raises(ValueError, match=told):
        nibble("quantize", SOURCE, out, *options)
    assert not out.exists()


def test_fast_takes_no_calibration(tmp_path, calibration):
    from comfyui_nibble.quant_core.calibration import Calibration
    from comfyui_nibble.quant_core.cli.wish import quantize_by_wish

    with pytest.raises(WishError, match="the wish fast takes no calibration"):
        quantize_by_wish(SOURCE, tmp_path / "q", "fast", Calibration(calibration))
