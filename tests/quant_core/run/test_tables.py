"""A report as Markdown and as CSV."""

import csv
import io
import itertools

import pytest

from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.run.tables import csv_text, markdown, what_to_do
from comfyui_nibble.quant_core.run.verdict import verdict

pytestmark = pytest.mark.quick

ROWS = [
    Row("blocks.0.a", "blocks.0", 64, 64, "W4A4 g64", 12.0, 2304, 0.5, {"smooth": "0.5", "rounding": "gptq"}),
    Row("blocks.0.b|c", "blocks.0", 64, 64, "W4A16 g64", None, 2304),
    Row("blocks.1.a", "blocks.1", 64, 64, "16 bit", note="8.1 dB"),
    Row("embedder", "", 64, 128, "16 bit", note="<b>embedder</b>"),
]
SHAPES = {f"{row.name}.weight": (row.out_features, row.in_features) for row in ROWS}


def test_markdown_begins_with_the_verdict_and_has_narrow_tables():
    text = markdown(ROWS, SHAPES, "A model", ["a note"])
    lines = text.splitlines()
    assert lines[0] == "### A model"
    said = verdict(ROWS, SHAPES)
    assert lines[1] == f"**Check.** {said.sentence}."
    assert lines[2 : 2 + len(said.advice)] == [f"- {line}" for line in said.advice]
    assert max(line.replace("\\|", "").count("|") for line in lines) <= 4
    for line in (
        "| Size | 0.0 of 0.0 MB |",
        "| Bits a weight | 4.50 |",
        "| Error, mean / worst | 12.0 / 12.0 dB |",
        "| 4 x 4 bit, 1 layers | 20.0 % of the weights |",
        "| 16 bit | 60.0 % of the weights |",
        "| block 0, a | 12.0 | 8 bit, by Nibble Guard |",
        "| b\\|c | 1 | - |",
        "| blocks.1.a | 8.1 dB (20.0 %) |",
        "| embedder | &lt;b>embedder&lt;/b> (40.0 %) |",
    ):
        assert line in lines, line
    assert lines[-1] == "a note"
    heads = [line for line, below in itertools.pairwise(lines) if below.startswith("| --- |")]
    assert [head.split("|")[1].strip() for head in heads] == [
        "The whole model",
        "Worst layers",
        "Kind of layer",
        "Left in 16 bit",
    ]


@pytest.mark.parametrize(
    ("what", "db", "choices", "advice"),
    [
        ("W4A4 g64", 18.0, {}, "nothing, it is close"),
        ("W4A4 g64", 12.0, {}, "8 bit, by Nibble Guard"),
        ("W4A8 g64", 12.0, {"guard": "raised"}, "8 or 16 bit, by Nibble Guard"),
        ("W8A8 per channel", 12.0, {}, "16 bit, by Nibble Guard"),
        ("W2A4 per channel", 12.0, {}, "more bits: a larger budget in Nibble Allocate Bits"),
        ("W4A16 g64", 12.0, {}, "calibrate on more samples"),
    ],
)
def test_what_to_do_about_a_layer(what, db, choices, advice):
    assert what_to_do(Row("a", "b", 64, 64, what, db, 2304, choices=choices)) == advice


def test_csv_has_every_layer_whole():
    first, second, third, last = csv.DictReader(io.StringIO(csv_text(ROWS, {"blocks.0.a": "eager"})))
    assert first == {
        "layer": "blocks.0.a",
        "block": "blocks.0",
        "kind": "a",
        "out_features": "64",
        "in_features": "64",
        "stored": "W4A4 g64",
        "error_db": "12.000",
        "bits_per_weight": "4.500",
        "bytes": "2304",
        "seconds": "0.50",
        "kernel": "eager",
        "choices": "smooth 0.5; rounding gptq",
        "note": "",
    }
    assert (second["error_db"], second["kind"]) == ("", "b|c")
    assert (third["bytes"], third["bits_per_weight"], third["note"]) == ("8192", "16.000", "8.1 dB")
    assert last["block"] == ""
