"""What reports say of sizes."""

import pytest
import torch

from comfyui_nibble.quant_core.formats import nibble
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.run.report import file_storage, quantization_text, storage, wrapped

pytestmark = pytest.mark.quick


def test_storage_is_bytes_against_bytes():
    # 10^6 weights: 4 MB, 2 MB, and 531250 bytes at 4.25 bits.
    assert storage("X", 250_000, 10**6) == "X: 0.2 MB (in fp32 4.0, in bf16 2.0, in plain 4 bit 0.5)"
    assert storage("X", 850_000, 10**6, 10**5) == "X: 0.8 MB (in fp32 4.4, in bf16 2.2, in plain 4 bit 0.7)"
    assert storage("X", 6_800_000_000, 11 * 10**9, 10**9).endswith(
        "X: 6.8 GB (in fp32 48.0, in bf16 24.0, in plain 4 bit 7.8)"
    )


def test_layers_left_in_16_bit_count():
    rows = [Row("a", "b", 1000, 1000, "W2A4", nbytes=250_000), Row("c", "b", 1000, 100, "16 bit")]
    text = quantization_text(rows, "t")
    assert "Blocks: 0.5 MB (in fp32 4.4, in bf16 2.2, in plain 4 bit 0.6)" in text  # 450 kB of 1.1 M weights


def test_a_report_goes_from_the_verdict_to_the_table():
    """In lines that a node shows whole, but for the details at the end."""
    rows = [
        Row(f"blocks.{i}.attention.query", f"blocks.{i}", 64, 64, "W4A4 g64", 20.0 + i, 2304, 0.5, {"a": "b"})
        for i in range(12)
    ]
    rows.append(Row("embedder", "", 64, 64, "16 bit", note="embedder, kept by the map"))
    shapes = {f"{row.name}.weight": (64, 64) for row in rows}
    notes = ["Runs on a card:", "  12 layers: int4 tensor cores; " + "reasons " * 12]
    text = quantization_text(rows, "A model", notes, {"blocks.0.attention.query": "eager"}, shapes)
    before, details = text.split("How each layer is stored, what was chosen, and what computes it:\n")
    assert max(map(len, before.splitlines())) <= 64
    parts = ["A model", "Good: ", "92.3 % of", "The 5 worst", "Left in 16 bit", "Runs on", "N x K  layer"]
    places = [before.index(part) for part in parts]
    assert places == sorted(places)
    assert "Layer error on held-out tokens: mean 25.5 dB, worst 20.0 dB" in before
    worst = before.split("worst layers:\n")[1].splitlines()[:6]
    assert worst[:5] == [f"   {20 + i}.00 dB  blocks.{i}.attention.query" for i in range(5)]
    assert worst[5] == ""
    assert " 20.00   4.50        64 x 64  blocks.0.attention.query\n" in before
    assert details.splitlines()[:2] == [
        "blocks.0.attention.query: W4A4 g64 (a b), eager, 0.50 s",
        "blocks.1.attention.query: W4A4 g64 (a b), 0.50 s",
    ]


def test_wrapped_lines_keep_their_indent():
    assert wrapped("a\n  b c d e", 7) == ["a", "  b c d", "    e"]
    assert wrapped("  x     y") == ["  x     y"]


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
