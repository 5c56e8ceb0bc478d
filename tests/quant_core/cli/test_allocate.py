"""Measuring, choosing and writing on the shipped model, with a menu that fits in seconds."""

import json

import pytest
import torch
from safetensors.torch import load_file

from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.quant_core.calibration.file import CalibrationError
from comfyui_nibble.quant_core.cli.allocate import allocate_file, read_gains
from comfyui_nibble.quant_core.evaluation.demo import run, tiny_flux
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats import stop
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.precision import menu, plot, sensitivity
from comfyui_nibble.quant_core.precision.allocate import Budget
from comfyui_nibble.quant_core.precision.budget import BudgetError
from comfyui_nibble.quant_core.precision.measured import relative_cost
from comfyui_nibble.quant_core.precision.menu import Entry, MixedConfig, variants
from comfyui_nibble.quant_core.precision.report import allocation_text

FAST = (("smooth", ((0.5, 0.5),)), ("low_rank", ("plain",)), ("iterations", 0), ("finalists", 1))
MENU = (*(Entry(f"A{b}", "robuq", (("activation_bits", b), *FAST)) for b in (2, 4)), Entry("16 bit"))
CONFIG = MixedConfig(MENU, 0, False)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    state = load_file(tiny_flux.CHECKPOINT)
    layers = FLUX.layers({k: tuple(v.shape) for k, v in state.items()})
    fingerprint = Checkpoint(tiny_flux.CHECKPOINT).fingerprint()
    return run.calibrate_tiny(
        tiny_flux.load(), layers, tmp_path_factory.mktemp("c"), steps=3, samples=4, model_hash=fingerprint
    )


@pytest.fixture(scope="module")
def measured(calibration, tmp_path_factory):
    """What one uninterrupted run measures, and its file."""
    path = tmp_path_factory.mktemp("m") / "t.json"
    return table(calibration, path), path


def table(calibration, path, settings=None):
    checkpoint = Checkpoint(tiny_flux.CHECKPOINT)
    layers = checkpoint.family.layers(checkpoint.shapes)
    return sensitivity.sensitivity(layers, checkpoint, calibration, CONFIG, path, settings or {"a": 1})


def test_table(measured):
    rows, _ = measured
    assert len(rows) == 16
    assert sum(r.fixed for r in rows) == 4
    for r in rows:
        assert list(r.options) == (["W4A16"] if r.fixed else ["A2", "A4", "16 bit"])
        if not r.fixed:
            assert r.options["A2"].noise > r.options["A4"].noise > 0 == r.options["16 bit"].noise
            assert [c.activation_bits for c in r.options.values()] == [2, 4, 16]
            assert [c.weight_bits for c in r.options.values()] == [2, 2, 16]
            assert [c.cost / r.weights for c in r.options.values()] == [2, 2, 4]
            assert r.options["16 bit"].nbytes == 2 * (r.weights + r.out_features)
            # Codes, scales of a row, smoothing and bias.
            assert r.options["A4"].nbytes == r.weights // 4 + 2 * r.in_features + r.out_features * (
                2 + 2
            ) + 2 * r.out_features * ("linear2" in r.name)


def test_stopped_run_goes_on_and_gives_the_same(calibration, measured, tmp_path, monkeypatch):
    seen, real = [], sensitivity.variants

    def dies_at_the_third(make, config):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(make, config)

    monkeypatch.setattr(sensitivity, "variants", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        table(calibration, tmp_path / "t.json")
    kept = json.loads((tmp_path / "t.json").read_text())["layers"]
    assert [k["name"] for k in kept] == [r.name for r in measured[0][: len(kept)]]
    assert len(kept) >= 2
    assert table(calibration, tmp_path / "t.json") == measured[0]
    assert len(seen) == 13  # 12 layers, one of them twice
    assert (tmp_path / "t.json").read_text() == measured[1].read_text()


def test_table_of_other_settings_is_replaced(calibration, measured, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    path.write_text(measured[1].read_text())
    monkeypatch.setattr(sensitivity, "variants", lambda make, config: iter([(Entry("16 bit"), None)]))
    assert table(calibration, path) == measured[0]
    assert {tuple(r.options) for r in table(calibration, path, {"a": 2})} == {("W4A16",), ("16 bit",)}
    path.write_text("{")
    with pytest.raises(
        ValueError, match=r"t\.json: not a table of sensitivities .* Delete it to measure again"
    ):
        table(calibration, path)


def test_a_layer_whose_weights_have_changed_is_measured_again(calibration, measured, tmp_path, monkeypatch):
    path, seen, real = tmp_path / "t.json", [], sensitivity.variants
    found = json.loads(measured[1].read_text())
    found["layers"][1]["source"] = "of other weights"
    path.write_text(json.dumps(found))
    monkeypatch.setattr(sensitivity, "variants", lambda *args: seen.append(1) or real(*args))
    assert table(calibration, path) == measured[0]
    assert len(seen) == sum(not row.fixed for row in measured[0][1:2])
    assert len(json.loads(path.read_text())["layers"]) == len(measured[0]) + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "x", None, True])
@pytest.mark.parametrize("where", ["noise", "in_features"])
def test_a_damaged_row_is_named(calibration, measured, tmp_path, where, value):
    path, found = tmp_path / "t.json", json.loads(measured[1].read_text())
    row = found["layers"][3]
    (next(iter(row["options"].values())) if where == "noise" else row)[where] = value
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"t\.json: not a table of sensitivities .* Delete it to measure"):
        table(calibration, path)


def test_no_held_out_tokens(calibration, tmp_path, monkeypatch):
    real = calibration.get

    def without(name, second_moments=True):
        s = real(name, second_moments)
        s.tokens = s.tokens[:0]
        return s

    monkeypatch.setattr(calibration, "get", without)
    with pytest.raises(CalibrationError, match="no held-out tokens of layer"):
        table(calibration, tmp_path / "t.json")


def test_file_is_what_was_chosen(calibration, tmp_path, monkeypatch):
    out = tmp_path / "q.safetensors"
    done, rows = allocate_file(tiny_flux.CHECKPOINT, out, calibration, Budget("activation", 3), CONFIG)
    pack = PackFile(out)
    bits = {"A2": 2, "A4": 4}
    layers = [s for s in done.table if not s.fixed]
    assert 2.97 <= done.allocation.reached <= 3
    for s in layers:
        chosen = done.allocation.layers[s.name]
        if chosen == "16 bit":
            assert f"{s.name}.weight" in pack.rest
        else:
            assert {p.activation.bits for p in pack.specs[s.name].parts} == {bits[chosen]}
            (row,) = [r for r in rows if r.name == s.name]
            assert row.choices["allocated"] == chosen
            assert 10 ** (-row.sqnr_db / 10) == pytest.approx(s.options[chosen].noise, rel=1e-6)
    assert pack.provenance["method"] == "mixed"
    assert pack.provenance["settings"]["layers"] == done.allocation.layers
    text = allocation_text(done, "q")
    assert text.startswith("q\nAsked for: 3 activation bits on average; reached: ")
    summary = text.split("\n\n")[0].splitlines()
    assert max(map(len, summary[1:])) <= 64
    assert "all A4" in text
    plot.plot(tmp_path / "p.png", done)
    from PIL import Image

    assert Image.open(tmp_path / "p.png").size[1] > 800
    # Another budget measures nothing again, and its file has just the bytes that were asked for.
    monkeypatch.setattr(sensitivity, "_measured", None)
    again, rows = allocate_file(tiny_flux.CHECKPOINT, out, calibration, Budget("memory", 6e6), CONFIG)
    assert (
        sum(t.nbytes for k, t in load_file(out).items() if not k.startswith(stop.PREFIX))
        == again.allocation.reached
    )
    assert 0.99 * 6e6 < again.allocation.reached <= 6e6
    kept = [r for r in rows if r.what == "16 bit"]
    chosen = {n for n, e in again.allocation.layers.items() if e == "16 bit"}
    assert {r.name for r in kept if r.name in again.allocation.layers} == chosen
    assert all(
        r.note for r in kept if r.name not in again.allocation.layers
    )  # a row of each other weight, with the reason
    assert kept
    assert kept[0].note == "allocated 16 bit"
    with pytest.raises(BudgetError, match="closest that can be met"):
        allocate_file(
            tiny_flux.CHECKPOINT, tmp_path / "q.safetensors", calibration, Budget("activation", 17), CONFIG
        )


def test_gains_move_the_bits(calibration, measured, tmp_path):
    (tmp_path / "q.safetensors.sensitivity.json").write_text("{}")
    name = "double_blocks.0.txt_mlp.2"
    with pytest.raises(ValueError, match="gains are given for layers that the model does not have: nonsense"):
        allocate_file(
            tiny_flux.CHECKPOINT,
            tmp_path / "r",
            calibration,
            Budget("activation", 3),
            CONFIG,
            {"nonsense": 1.0},
        )
    from comfyui_nibble.quant_core.precision.allocate import allocate

    three = Budget("activation", 3)
    assert allocate(measured[0], three).layers[name] == "A2"
    assert allocate(measured[0], three, {name: 1e4}).layers[name] != "A2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"a": -1}', "gain of a: expected a number of 0 or more, found -1"),
        ('{"a": true}', "found True"),
    ],
)
def test_gains_that_mean_nothing(tmp_path, text, message):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(ValueError, match=f"g.json: .*{message}"):
        read_gains(tmp_path / "g.json")


def test_gains_file(tmp_path):
    (tmp_path / "g.json").write_text('{"a": 2, "b": 0.5}')
    assert read_gains(tmp_path / "g.json") == {"a": 2, "b": 0.5}


# -- the menu


def test_entries_of_one_fit_share_it(make_problem, monkeypatch):
    config = MixedConfig(menu.menu("mixed")[3:], 16, False)
    fits, real = [], menu._fit
    monkeypatch.setattr(menu, "_fit", lambda *args: fits.append(args[1].name) or real(*args))
    problem = make_problem(96, 256)
    made = {e.name: layer for e, layer in variants(lambda: make_problem(96, 256), config)}
    assert fits == ["robuq A4", "svdquant_r W4A4"]
    what = {n: None if q is None else q.spec.describe().split()[0] for n, q in made.items()}
    assert what == {
        "robuq A4": "W2A4", "svdquant_r W4A4": "W4A4", "svdquant_r W4A8": "W4A8", "svdquant_r W8A8": "W8A8",
        "16 bit": None,
    }  # fmt: skip
    assert made["robuq A4"].spec.rank == made["svdquant_r W4A4"].spec.rank == 16
    db = [output_sqnr(problem, q) for q in made.values() if q is not None]
    assert db == sorted(db)
    for name, layer in made.items():
        fitted = menu.fit(
            make_problem(96, 256), MixedConfig(config.menu, 16, False, {"blocks.0.linear": name})
        )
        assert (fitted.layer is None) == (layer is None)
        assert fitted.choices["allocated"] == name
        assert layer is None or all(torch.equal(fitted.layer.tensors[k], t) for k, t in layer.tensors.items())


def test_names_that_are_not_there(make_problem):
    with pytest.raises(ValueError, match="unknown menu 'all'. Menus: robuq, mixed."):
        menu.menu("all")
    with pytest.raises(
        ValueError, match=r"layer blocks\.0\.linear: the allocation says nothing of it; it names 0 layers"
    ):
        menu.fit(make_problem(32, 64), CONFIG)


@pytest.mark.parametrize(
    ("weight", "activation", "cost"),
    [(4, 4, 1), (4, 2, 1), (4, 8, 2), (2, 2, 2), (2, 8, 2), (8, 8, 2), (4, None, 4)],
)
def test_speed_proxy(weight, activation, cost):
    act = None if activation is None else ActivationSpec(activation, "token")
    spec = LinearSpec(256, 8, (PartSpec(0, 256, WeightSpec(weight, "channel"), act),))
    assert relative_cost(spec) == cost
    assert relative_cost(None) == 4
