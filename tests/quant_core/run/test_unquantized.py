"""Every weight of a model that stays in 16 bit has a row that says why."""

import pytest

from comfyui_nibble.quant_core.families import FLUX, GENERIC, WAN, detect
from comfyui_nibble.quant_core.families.chroma import CHROMA
from comfyui_nibble.quant_core.families.sdxl import SDXL
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.run.report import left_overs, quantization_text, whole
from comfyui_nibble.quant_core.run.unquantized import kept_rows
from comfyui_nibble.tests.assets.synthetic import chroma_shapes, flux_shapes, sdxl_shapes, wan_shapes

pytestmark = pytest.mark.quick

BLOCKS = {f"blocks.{i}.{x}.weight": (128, 128) for i in range(2) for x in "qkv"}


def rows_of(family, shapes, **nbytes):
    return [
        Row(x.name, x.block, x.in_features, x.out_features, "W4A4", nbytes=9, **nbytes)
        for x in family.mapped(shapes)
    ]


@pytest.mark.parametrize(
    ("family", "shapes"),
    [(FLUX, flux_shapes()), (CHROMA, chroma_shapes()), (WAN, wan_shapes()), (SDXL, sdxl_shapes())],
)
def test_every_layer_has_one_row(family, shapes):
    done = rows_of(family, shapes)
    kept = kept_rows(shapes, family, done)
    layers = {k.removesuffix(".weight") for k, s in shapes.items() if len(s) > 1 and k.endswith(".weight")}
    assert {r.name for r in done} | {r.name for r in kept} >= layers
    assert not {r.name for r in done} & {r.name for r in kept}
    assert len({r.name for r in kept}) == len(kept)
    assert all(r.note and not r.block and not r.quantized for r in kept)
    assert all(r.weights == r.in_features * r.out_features > 0 for r in kept)


def why(family, shapes, done=()):
    return {row.name: row.note for row in kept_rows(shapes, family, list(done))}


def test_reasons_of_a_map():
    notes = why(SDXL, sdxl_shapes(), rows_of(SDXL, sdxl_shapes()))
    assert notes["input_blocks.0.0"] == "3x3 convolution"
    assert (
        notes["input_blocks.1.0.emb_layers.1"]
        == "kept by the map: the time vector of a residual block, 0.6 % of SDXL"
    )
    assert notes["label_emb.0.0"] == "embedder, kept by the map"
    notes = why(FLUX, flux_shapes(), rows_of(FLUX, flux_shapes()))
    assert notes["img_in"] == notes["final_layer.linear"] == "first or last projection, kept by the map"
    assert notes["txt_in"] == notes["guidance_in.out_layer"] == "embedder, kept by the map"
    notes = why(WAN, wan_shapes(), rows_of(WAN, wan_shapes()))
    assert notes["time_projection.1"] == "modulation that all blocks share: quantized with a calibration only"
    assert notes["patch_embedding"] == "1x2x2 convolution"


def test_reasons_of_the_rules():
    others = {
        "x_embedder.weight": (128, 64),
        "blocks.0.gate.weight": (8, 128),
        "adapter.weight": (128, 256),
        "output_blocks.5.1.mixer.weight": (128, 256),
        "blocks.1.conv.weight": (128, 128, 3),
        "mapper.weight": (128, 128, 1, 1),
        "blocks.0.experts.gate_up": (16, 512, 128),
        "pos_embed": (1, 1024, 1024),
        "scale_shift_table": (6, 128),
    }
    shapes = BLOCKS | others
    assert detect(shapes) is GENERIC
    done = [Row(k.removesuffix(".weight"), "blocks", 128, 128, "W4A4", nbytes=9) for k in list(BLOCKS)[1:]]
    assert why(GENERIC, shapes, done) == {
        "blocks.0.q": "no linear layer of the network",  # an embedding that the rules took for one
        "x_embedder": "first or last projection, kept by the rules",
        "blocks.0.gate": "8 x 128, narrower than 64",
        "adapter": "outside of repeated blocks",
        "output_blocks.5.1.mixer": "outside of repeated blocks",
        "blocks.1.conv": "3-wide convolution",
        "mapper": "1x1 convolution",
        "blocks.0.experts.gate_up": "a bank of 16 matrices of 512 x 128: no kernel takes it",
        "pos_embed": "a table",
    }
    bank = next(r for r in kept_rows(shapes, GENERIC, done) if r.name.endswith("gate_up"))
    assert (bank.in_features, bank.out_features) == (128, 16 * 512)


def test_a_report_counts_the_whole_model():
    """FLUX.2 dev as 0.5 quantized it: a fourth of its weights."""
    shapes = {
        "a.weight": (1000, 8000),
        "b.0.weight": (1000, 12000),
        "b.1.weight": (1000, 12000),
        "bias": (1000,),
        "c.weight": (10, 100),
    }
    rows = [Row("a", "x", 8000, 1000, "W4A4", nbytes=4_600_000)]
    rows += [Row(f"b.{i}", "", 12000, 1000, "16 bit", note="embedder, kept by the map") for i in range(2)]
    rows += [Row("c", "x", 100, 10, "16 bit", note="8.1 dB")]
    assert whole(rows, shapes) == "25.0 % of the weights are quantized, 52.6 of 64.0 MB remain"
    assert left_overs(rows, shapes) == [
        "Left in 16 bit: c (8.1 dB), 0.0 % of the weights",
        "Left in 16 bit: 2 x b.N (embedder, kept by the map), 75.0 % of the weights",
    ]
    text = quantization_text(rows, "t", shapes=shapes)
    assert text.splitlines()[1].startswith("Check: Not measured")
    assert whole(rows, shapes) in text.splitlines()
    # What no plan had does not count to the blocks.
    assert "1 layers: 16.0 in 16 bit, now 4.6 MB; 4.60 bits a weight" in text
    assert "Blocks: 4.6 MB (in fp32 32.0, in bf16 16.0, in plain 4 bit 4.3)" in text


def test_of_many_left_overs_the_biggest_are_named():
    rows = [Row(f"x{chr(97 + i)}", "", 100, 100 + i, "16 bit", note="embedder") for i in range(26)]
    lines = left_overs(rows)
    assert lines[0] == "Left in 16 bit: xz (embedder)"
    assert lines[-1] == "Left in 16 bit: 16 more"
    assert len(lines) == 11
