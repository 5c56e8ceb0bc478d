"""Where layers stand in a map, and in few letters."""

import pytest

from comfyui_nibble.quant_core.charts.layers import (
    KINDS,
    OTHERS,
    kind_of,
    off,
    panels,
    place_of,
    precision,
    precisions,
    worst,
)
from comfyui_nibble.quant_core.layer.row import Row

pytestmark = pytest.mark.quick


def test_flux_has_a_panel_for_each_kind_of_block(rows):
    double, single = panels(rows)
    assert (double.title, single.title) == ("double blocks", "single blocks")
    assert double.numbers == [str(i) for i in range(19)]
    assert double.kinds == ["img_mod.lin", "img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "img_mlp.2"]
    assert single.kinds == ["modulation.lin", "linear1", "linear2"]
    assert len(double.cells) + len(single.cells) == len(rows) - 1  # the embedder has no place
    assert single.cells[2, 37].name == "single_blocks.37.linear2"


def unet(blocks=70, kinds=10):
    return [
        Row(f"{b}.{k}", b, 64, 64, "W4A4", 20.0, 2304)
        for i in range(blocks)
        for b in [f"input_blocks.{i % 4}.1.transformer_blocks.{i}" if i % 3 else f"{'abcd'[i % 4]}{i}.x.{i}"]
        for k in (f"attn{j}.to_q" for j in range(kinds))
    ]


def test_many_kinds_of_block_share_a_panel():
    (panel,) = panels(unet())
    assert len(panel.numbers) == 70
    assert len(panel.cells) == 700
    assert panel.title == "blocks, in the model's order"


def test_too_many_kinds_share_a_line_with_the_worst_of_them():
    found = [Row(f"blocks.0.k{i}", "blocks.0", 64, 64, "W4A4", 30.0 - i, 2304) for i in range(40)]
    (panel,) = panels(found)
    assert len(panel.kinds) == KINDS
    assert panel.kinds[-1] == OTHERS
    assert panel.cells[KINDS - 1, 0].sqnr_db == -9.0


def test_names():
    row = lambda name, block, what="W4A4 g64", nbytes=1: Row(name, block, 1, 1, what, nbytes=nbytes)
    assert kind_of(row("double_blocks.5.img_mlp.2", "double_blocks.5")) == "img_mlp.2"
    assert place_of(row("double_blocks.5.img_mlp.2", "double_blocks.5")) == "double 5, img_mlp.2"
    assert place_of(row("blocks.5.ffn.0", "blocks.5")) == "block 5, ffn.0"
    assert place_of(row("img_in", "")) == "img_in"
    assert precision(row("a", "", "W4A8 per channel")) == "4 x 8"
    assert precision(row("a", "", "16 bit", 0)) == "16 bit"
    assert off(20) == pytest.approx(0.1)


def test_precisions_and_the_worst(rows):
    found = precisions(rows)
    assert [name for name, *_ in found] == ["4 x 4", "4 x 16", "8 x 8", "16 bit"]
    assert sum(layers for _, layers, _ in found) == len(rows)
    assert found[2][1:] == (1, 3072**2)
    assert [row.sqnr_db for row in worst(rows)] == [15.0, 15.25, 15.25, 15.5, 15.5]
