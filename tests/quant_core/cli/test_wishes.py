"""`nibble demo --wishes` on a small model with fewer captions: the rows are those of files and pictures."""

from dataclasses import replace

import pytest

from comfyui_nibble.quant_core.cli import wishes
from comfyui_nibble.quant_core.cli.wishes import measure_wishes, wishes_text
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux


def test_a_row_for_each_wish(monkeypatch):
    monkeypatch.setattr(wishes, "SAMPLES", 4)
    monkeypatch.setattr(wishes, "WISHES", ("balanced", "fast"))
    balanced, fast = measure_wishes(replace(tiny_flux.MODEL, random_judged=0, steps=3))
    assert (balanced["wish"], fast["wish"]) == ("balanced", "fast")
    assert balanced["bytes_16_bit"] == fast["bytes_16_bit"] == 9_535_616
    assert 0.2 < balanced["bytes"] / balanced["bytes_16_bit"] < 0.6
    assert (fast["calibrate_seconds"], balanced["calibrate_seconds"] > 0) == (0.0, True)
    assert len(balanced["each_psnr_db"]) == len(tiny_flux.MODEL.world.CAPTIONS)
    assert min(balanced["each_psnr_db"]) > max(fast["each_psnr_db"])  # hard outliers want a calibration
    lines = wishes_text([balanced, fast]).splitlines()
    assert lines[1].startswith("balanced ")
    assert lines[2].endswith("better in 0 of 8 than balanced")


@pytest.mark.quick
def test_text():
    row = {"bytes": 2e6, "bytes_16_bit": 9e6, "calibrate_seconds": 3.0, "seconds": 4.0}
    rows = [
        row | {"wish": "balanced", "each_psnr_db": [30.0, 31.0]},
        row | {"wish": "best", "each_psnr_db": [32.0, 33.0]},
    ]
    figures, against = wishes_text(rows).splitlines()[2].split("  +")
    assert figures.split() == ["best", "2.00", "9.00", "3", "4", "32.5"]
    assert against == "2.00 dB (+2.00 to +2.00), better in 2 of 2 than balanced"
