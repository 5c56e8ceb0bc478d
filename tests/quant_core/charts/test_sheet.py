"""Drawings, and what there is without matplotlib."""

import logging
import sys

import pytest
import torch

from comfyui_nibble.quant_core.charts import heatmap, summary
from comfyui_nibble.quant_core.charts.curves import curves
from comfyui_nibble.quant_core.charts.sheet import Section, drawn, fitting, gap, save
from comfyui_nibble.quant_core.charts.style import LIGHT, THEMES, WIDTH, rgb, standing_out
from comfyui_nibble.quant_core.charts.words import page


def near(pixels, color):
    """How many pixels have a colour."""
    return int(((pixels[0] - torch.as_tensor(color).float()).abs().amax(-1) < 0.01).sum())


@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_a_report_is_drawn_inside_of_its_edges(rows, theme):
    sections = [
        summary.headline("A long title " * 9, "A sentence of many words. " * 9, "amber"),
        summary.shares(rows, sum(row.weights for row in rows)),
        heatmap.error_map(rows),
        summary.worst_layers(rows),
        heatmap.bits_map(rows),
        heatmap.size_map(rows),
        heatmap.kernel_map(rows, {row.name: "int4 tensor cores" for row in rows if row.quantized}),
        curves("Curve", "Gloss", {"a": [(0, 1), (1, 2)], "b": [(0, 2), (1, 1)]}, "x", reverse=True),
        curves("Loss", "Gloss", {"a": [(0, 1), (1, 0.1)]}, "step", log=True),
    ]
    pixels, notes = drawn(sections, theme)
    assert notes == []
    assert pixels.shape == (1, sum(section.height for section in sections), WIDTH, 3)
    assert pixels.dtype == torch.float32
    # Nothing runs out of the picture.
    for edge in (pixels[0, :, :8], pixels[0, :, -8:], pixels[0, :6], pixels[0, -6:]):
        assert near(edge[None], rgb(theme.background)) == edge[..., 0].numel()


def test_the_worst_layers_are_framed_and_stand_out(rows):
    pixels, _ = drawn([heatmap.error_map(rows)])
    assert near(pixels, rgb(standing_out(THEMES["dark"])[-1])) > 200
    few = [row for row in rows if row.block == "single_blocks.37"]
    plain, _ = drawn([heatmap.error_map(few, frozenset())])
    framed, _ = drawn([heatmap.error_map(few, frozenset({"single_blocks.37.linear1"}))])
    assert (plain - framed).abs().amax(-1).gt(0.1).sum() > 2 * (110 + 20)


def test_a_thousand_layers_fit(rows):
    many = [
        type(rows[0])(f"blocks.{i}.k{j}", f"blocks.{i}", 64, 64, "W4A4", 20.0 + j, 2304)
        for i in range(90)
        for j in range(12)
    ]
    pixels, notes = drawn([heatmap.error_map(many)])
    assert notes == []
    assert near(pixels[:, :, -20:], rgb(THEMES["dark"].background)) == pixels[0, :, -20:, 0].numel()


def test_files_are_pngs(tmp_path, rows):
    from PIL import Image

    save(tmp_path / "a.png", [summary.shares(rows, 10**9)], LIGHT)
    assert Image.open(tmp_path / "a.png").size == (WIDTH, 190)


def test_without_matplotlib_the_picture_says_so_in_words(rows, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pixels, (note,) = drawn([summary.headline("FLUX.1", "Close."), heatmap.error_map(rows)])
    assert note == (
        "No chart: it needs matplotlib, which is not installed. Run in ComfyUI's Python: python -m pip "
        "install matplotlib, then restart."
    )
    said = page([*note.split(" Run"), "FLUX.1"], THEMES["dark"])
    assert pixels.shape[1:] == (pixels.shape[1], WIDTH, 3)
    assert pixels.shape[1] > said.shape[1]
    assert near(pixels, (1.0, 1.0, 1.0)) < 100  # no white square
    assert len((255 * pixels[..., 0]).byte().unique()) > 20  # there are words on it


def test_a_drawing_that_fails_is_no_lost_run(caplog):
    def fails(area):
        raise KeyError("a bug")

    with caplog.at_level(logging.ERROR):
        pixels, (note,) = drawn([Section(100, fails, ["what it says"])])
    assert note == "No chart: KeyError: 'a bug'. ComfyUI's log has more."
    assert pixels.shape[2] == WIDTH
    assert "a bug" in caplog.text


def test_small_parts():
    assert fitting("abcdefghij", 1000) == "abcdefghij"
    assert fitting("abcdefghij", 0.62 * 24 * 7) == "abc…hij"
    assert gap(14).height == 14
    assert summary.percent(0.0001) == "below 0.1 %"
    assert summary.percent(0.9996) == "99.96 %"
    assert summary.percent(0.5) == "50.0 %"
    assert summary.amount(6.84e9) == "6.8 GB"
    assert summary.amount(3.21e6) == "3.2 MB"
