"""What reports say of sizes."""

import pytest
import torch

from comfyui_nibble.quant_core.formats import nibble
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.run.report import file_storage, quantization_text, storage

pytestmark = pytest.mark.quick


def test_storage_is_bytes_against_bytes():
    # 10^6 weights: 4 MB, 2 MB, and 531250 bytes at 4.25 bits.
    assert (
        storage("X", 250_000, 10**6)
        == "X, 0.2 MB: 16.0x smaller than fp32, 8.0x than bf16, 2.12x than 4-bit with scales"
    )
    assert (
        storage("X", 850_000, 10**6, 10**5)
        == "X, 0.8 MB: 5.2x smaller than fp32, 2.6x than bf16, 0.86x than 4-bit with scales"
    )


def test_layers_left_in_16_bit_count():
    rows = [Row("a", "b", 1000, 1000, "W2A4", nbytes=250_000), Row("c", "b", 1000, 100, "16 bit")]
    text = quantization_text(rows, "t")
    assert (
        "Blocks, 0.5 MB: 9.8x smaller than fp32, 4.9x than bf16, 1.30x than 4-bit with scales" in text
    )  # 450 kB of 1.1 M weights


def test_whole_file(make_problem, tmp_path):
    layer = (
        METHODS["robuq"]
        .fit(make_problem(128, 256, calibrated=False), METHODS["robuq"].configured(rank=0))
        .layer
    )
    rest = {"img_in.weight": torch.ones(64, 64).bfloat16(), "left.weight": torch.ones(32, 64).bfloat16()}
    rows = [Row(layer.name, "b", 256, 128, "W2A4", nbytes=layer.nbytes), Row("left", "b", 64, 32, "16 bit")]
    for base3 in (False, True):
        nibble.save(tmp_path / "m", {layer.name: layer}, rest, "flux", {}, [r.to_json() for r in rows], base3)
        size = (tmp_path / "m").stat().st_size
        weights, others = 128 * 256 + 32 * 64, 64 * 64 + 128  # the bias
        what = "Whole file, 1 ternary layers in base 3" if base3 else "Whole file"
        assert file_storage(nibble.PackFile(tmp_path / "m")) == storage(what, size, weights, others)
