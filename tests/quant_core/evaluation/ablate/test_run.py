import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from comfyui_nibble.quant_core.calibration import CalibrationError
from comfyui_nibble.quant_core.calibration.trajectory import Call, Trajectory
from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.ablate import run as ablation
from comfyui_nibble.quant_core.evaluation.ablate import splitquant
from comfyui_nibble.quant_core.evaluation.ablate.splitquant import Entry, untrained
from comfyui_nibble.quant_core.evaluation.ablate.table import ablation_text
from comfyui_nibble.quant_core.evaluation.demo import shield_pixart
from comfyui_nibble.quant_core.evaluation.inputs import KINDS
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.store.workers import HERE
from comfyui_nibble.quant_core.training.presets import Preset
from comfyui_nibble.quant_core.training.reconstruct import TrainConfig
from comfyui_nibble.tests.support import single_thread

SMALL = {
    "captions": ("large red circle center on plain blue background",),
    "steps": 2,
    "samples": 2,
    "seeds": (7, 8),
}
ROWS = [
    Entry("convrot", METHODS["convrot"]),
    untrained((1, "shared", "hadamard", "token", False)),
    untrained((4, "shared", "hadamard", "slice", False)),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with single_thread():
        yield


def quick(entries):
    """With one smoothing and without GPTQ."""
    fast = lambda m: (
        replace(m, config=replace(m.config, smooth=((0.5, 0.5),), gptq=False))
        if m.name == "splitquant_4"
        else m
    )
    return [replace(entry, method=fast(entry.method)) for entry in entries]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, rows) of three rows, one of them sampled for its coherent SQNR."""
    folder = tmp_path_factory.mktemp("ablation")
    return folder, ablation.run(folder, quick(ROWS), best=1, **SMALL)


def test_sqnr_of_a_known_error():
    """An error that is the same in all calls of a sample counts whole, one that changes its sign not at
    all."""
    calls = [
        Call(sample, step, 1.0, True, 0.0, {"args": [{"tensor": f"{sample}"}, step], "kwargs": {}})
        for sample in (0, 1)
        for step in range(4)
    ]
    inputs = {"0": torch.full((10,), 2.0), "1": torch.full((10,), 4.0)}
    t = Trajectory(calls, inputs.__getitem__)
    want = {i: t.run(lambda x, step: x, i) for i in range(8)}  # mean energy (4 + 16) / 2 = 10
    same = ablation.prediction_db(lambda x, step: x + 0.1, t, want)
    assert same == pytest.approx((30, 30))
    sign, coherent = ablation.prediction_db(lambda x, step: x + 0.1 * (-1) ** step, t, want)
    assert sign == pytest.approx(30)
    assert coherent > 120
    other = ablation.prediction_db(lambda x, step: x + 0.1 * (step == 0), t, want)
    assert other == pytest.approx((30 + 6.0206, 30 + 12.0412), abs=1e-3)


def test_rows_have_their_figures(done):
    folder, rows = done
    assert [row["name"] for row in rows] == [e.name for e in ROWS]
    convrot, one, four = rows
    for row in rows:
        assert row["worst_db"] <= row["layer_db"]
        assert row["prediction_db"] < row["coherent_db"]
    assert one["coherent_db"] > convrot["coherent_db"] + 3  # hard outliers, no smoothing
    # 256 wide: (16 + 16) a channel and (8 + 8); 1024: (32 + 32) and (16 + 16).
    specs = ((256, 768), (256, 256), (256, 1024), (1024, 256)) * 2 + (
        (256, 1792),
        (256, 256),
        (1024, 256),
    ) * 2
    product = sum(k * n for k, n in specs)
    assert one["cost"] == pytest.approx(sum(k * {256: 32, 1024: 64}[k] for k, _ in specs) / product)
    assert four["cost"] == pytest.approx(sum(k * {256: 16, 1024: 32}[k] for k, _ in specs) / product)
    assert {"each_db", "ssim", "image_db", "latent_db", "median_db"} <= convrot.keys()  # asked for
    (first,), (second,) = convrot["each_db"]  # a list a seed, a picture a caption
    assert first != second
    assert convrot["median_db"] == pytest.approx((first + second) / 2)
    # Errors of equally many pixels add up.
    of_both = -10 * np.log10((10 ** (-first / 10) + 10 ** (-second / 10)) / 2)
    assert convrot["image_db"] == pytest.approx(of_both)
    assert 0 < convrot["ssim"] < 1
    assert 4 < convrot["bits"] < one["bits"] + 1 < 7
    best = max(rows, key=lambda row: row["coherent_db"])
    assert "image_db" in best
    assert sum("image_db" in row for row in rows) == 2
    assert not list(folder.glob("partial*"))


def test_kinds_are_added_to_rows_that_are_there(done, monkeypatch):
    """Those of untrained rows alone: a layer by itself is not trained."""
    folder, rows = done
    judged = []
    monkeypatch.setattr(
        ablation, "fit_kind", lambda kind, method: judged.append((kind, method.name)) or {"sqnr_db": 12.5}
    )
    monkeypatch.setattr(ablation, "measure", lambda *_, **__: pytest.fail("measured again"))
    found = ablation.run(folder, quick(ROWS), best=0, kinds=True, **SMALL)
    assert judged == [(kind, row.method.name) for row in ROWS for kind in KINDS]
    assert [row["kinds"] for row in found] == [dict.fromkeys(KINDS, 12.5)] * 3
    assert [row["coherent_db"] for row in found] == [row["coherent_db"] for row in rows]
    ablation.run(folder, quick(ROWS), best=0, kinds=True, **SMALL)
    assert len(judged) == 3 * len(KINDS)


def test_stopped_run_goes_on(done, monkeypatch):
    folder, rows = done
    path = folder / "rows.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"layers": whole["layers"][:2]}))
    measured, real = [], ablation.measure
    monkeypatch.setattr(
        ablation,
        "measure",
        lambda world, entry, *args, **kwargs: (
            measured.append(entry.name) or real(world, entry, *args, **kwargs)
        ),
    )
    again = ablation.run(folder, quick(ROWS), best=0, **SMALL)
    assert measured == [ROWS[2].name]
    figures = ("layer_db", "worst_db", "prediction_db", "coherent_db", "cost")
    assert [[row[k] for k in figures] for row in again] == [[row[k] for k in figures] for row in rows]
    measured.clear()
    ablation.run(folder, quick(ROWS), best=0, **SMALL)
    assert measured == []
    # Another default in the meantime is another row; the others stay.
    other = quick(ROWS)[1]
    other = replace(other, method=replace(other.method, config=replace(other.method.config, seed=1)))
    changed = ablation.run(folder, [quick(ROWS)[0], other], best=0, **SMALL)
    assert measured == [other.name]
    assert changed[1]["settings"]["config"]["seed"] == 1
    path.write_text("{")
    with pytest.raises(
        ValueError, match=r"rows.json: not a table of an ablation .*Delete it to measure again"
    ):
        ablation.run(folder, quick(ROWS), **SMALL)


class Backwards:
    """Workers that finish the last item first, and are interrupted when they have done so many."""

    def __init__(self, count):
        self.count = count

    def map(self, work, items, name, memory):
        for number, item in enumerate(reversed(items)):
            if number == self.count:
                raise KeyboardInterrupt
            yield work(item)


@pytest.mark.quick
def test_rows_finished_before_an_interrupt_are_kept_in_whatever_order(tmp_path, monkeypatch):
    measured = []

    def measure(world, entry, with_pictures):
        measured.append(entry.name)
        return {"name": entry.name, "settings": entry.settings, "coherent_db": 1.0, "each_db": []}

    world = SimpleNamespace(calibration=SimpleNamespace(hash="c"), captions=())
    monkeypatch.setattr(ablation.World, "make", lambda *_, **__: world)
    monkeypatch.setattr(ablation, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        ablation.run(tmp_path, ROWS, workers=Backwards(2))
    assert measured == [ROWS[2].name, ROWS[1].name]
    rows = ablation.run(tmp_path, ROWS, workers=Backwards(9))
    assert measured[2:] == [ROWS[0].name]
    assert [row["name"] for row in rows] == [entry.name for entry in ROWS]


def test_trained_row(done):
    """Its layers are trained on the calibration's recorded calls, and no longer those of the untrained
    row."""
    folder, rows = done
    world = ablation.World.make(folder, 1.0, **SMALL)
    preset = Preset(TrainConfig(("bias", "scale"), steps=1, calls=2), None)
    trained = replace(quick(ROWS)[1], name="trained", levels=(), pictures=True, preset=preset)
    row = ablation.measure(world, trained)
    assert row["settings"]["training"]["blocks"]["steps"] == 1
    assert row["coherent_db"] != rows[1]["coherent_db"]
    assert abs(row["coherent_db"] - rows[1]["coherent_db"]) < 3
    assert row["image_db"] > 20
    assert not list(folder.glob("partial*"))


def test_of_another_model(tmp_path):
    """Its own captions, family and latents; the folder is no other model's."""
    small, asked = shield_pixart.MODEL, {"steps": 2, "samples": 2, "seeds": (7,)}
    world = ablation.World.make(tmp_path, 1.0, small.judged[:1], small=small, **asked)
    assert ablation.pictures_of(world.model, world)["each_db"] == [[200.0]]  # the most that it says
    network, rows, _ = world.quantize(Entry("rtn", METHODS["rtn"]))
    assert {layer.name for layer in world.plan} <= {row.name for row in rows}
    assert ablation.pictures_of(network, world)["each_db"][0][0] < 20
    with pytest.raises(CalibrationError, match="shield_pixart, outliers 1"):
        ablation.World.make(tmp_path, 1.0, **asked)


def test_command(done, tmp_path, monkeypatch):
    _, rows = done
    asked = SimpleNamespace(args=None)
    monkeypatch.setattr(splitquant, "entries", lambda quick: ["quick"] * quick)
    monkeypatch.setattr(
        ablation, "run", lambda *args, **options: setattr(asked, "args", (args, options)) or rows
    )
    command = ["ablate", "splitquant", "--out", str(tmp_path), "--quick", "--severity", "0.4", "--kinds"]
    result = CliRunner().invoke(app, [*command, "--seeds", "3", "--model", "shields"])
    assert result.exit_code == 0, result.output
    assert asked.args[0][:3] == (tmp_path, ["quick"], 0.4)
    made = {"seeds": range(7, 10), "kinds": True, "small": shield_pixart.MODEL, "workers": HERE}
    assert asked.args[1] == made
    against = splitquant.AGAINST
    assert result.stdout == (tmp_path / "ablation.txt").read_text() == ablation_text(rows, against) + "\n"
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
