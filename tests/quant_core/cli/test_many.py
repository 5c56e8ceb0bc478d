"""`nibble quantize-all` on the small FLUX: what it makes, goes on with, tries again and refuses."""

import json

import pytest

from comfyui_nibble.quant_core.cli import many
from comfyui_nibble.quant_core.cli.many import quantize_all, recipes_of
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.support import nibble

SOURCE = tiny_flux.CHECKPOINT


@pytest.fixture
def recipes(tmp_path, calibration):
    path = tmp_path / "list.yaml"
    path.write_text(
        f"""
models:
  - {{source: {SOURCE}, destination: a.safetensors, method: rtn}}
  - {{source: {SOURCE}, destination: out/b.safetensors, method: convrot, options: {{rotation: 64}},
     calibration: {calibration}}}
"""
    )
    return path


def test_each_model_by_its_recipe_and_only_once(tmp_path, recipes, monkeypatch):
    text = nibble("quantize-all", recipes)
    assert [line.split("  ")[:2] for line in text.splitlines()] == [
        ["a.safetensors", "rtn"],
        ["b.safetensors", "convrot"],
    ]
    second = PackFile(tmp_path / "out" / "b.safetensors")
    assert (second.provenance["method"], second.provenance["settings"]["rotation"]) == ("convrot", 64)
    monkeypatch.setattr(many, "quantize_file", None)
    again = quantize_all(recipes)
    assert [r.failed for r in again] == [False, False]
    assert again[1].nbytes == (tmp_path / "out" / "b.safetensors").stat().st_size
    (tmp_path / "a.safetensors").unlink()  # only this one is made again
    monkeypatch.undo()
    made = quantize_all(recipes)
    assert (tmp_path / "a.safetensors").is_file()
    assert made[1] == again[1]


def test_one_that_fails_does_not_stop_the_others_and_is_tried_again(tmp_path, recipes, monkeypatch):
    real = many.quantize_file

    def fails(source, destination, *args, **options):
        if destination.name == "a.safetensors":
            raise ValueError("layer x: out of luck")
        return real(source, destination, *args, **options)

    monkeypatch.setattr(many, "quantize_file", fails)
    results = quantize_all(recipes)
    assert [r.failed for r in results] == [True, False]
    assert results[0].told == "layer x: out of luck"
    rows = json.loads((tmp_path / "list.yaml.results.json").read_text())["layers"]
    assert [row["failed"] for row in rows] == [True, False]
    monkeypatch.undo()
    assert [r.failed for r in quantize_all(recipes)] == [False, False]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "not YAML"),
        ("models: 3", "expected a list of models, found 3"),
        ("- {source: a}", "model 1: expected an object with source and destination"),
        ("- {source: a, destination: b, metod: rtn}", "model 1: unknown metod; known are calibration"),
        ("- {source: a, destination: b, method: magic}", "model 1: unknown method 'magic'"),
        ("- {source: a, destination: b, wish: great}", "model 1: unknown wish 'great'"),
        ("- {source: a, destination: b, wish: fast, method: rtn}", "model 1: a wish chooses"),
        ("- {source: a, destination: b, options: {rank: 1}, method: rtn}", "method rtn has no option"),
        ("- {source: a, destination: b}\n- {source: c, destination: b}", "two models are to be written to"),
    ],
)
def test_a_list_that_cannot_be_done_is_refused_whole(tmp_path, text, told):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"list.yaml.*{told}"):
        recipes_of(path)


def test_a_source_that_is_missing_is_refused_before_the_first_model(tmp_path, recipes, monkeypatch):
    recipes.write_text(recipes.read_text() + "  - {source: gone.safetensors, destination: c.safetensors}\n")
    monkeypatch.setattr(many, "quantize_file", None)
    with pytest.raises(ValueError, match=r"gone.safetensors: not found"):
        quantize_all(recipes)
