import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from comfyui_nibble.quant_core.calibration.trajectory import Call, Trajectory
from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.ablate import run as ablation
from comfyui_nibble.quant_core.evaluation.ablate import splitquant
from comfyui_nibble.quant_core.evaluation.ablate.plot import plot
from comfyui_nibble.quant_core.evaluation.ablate.splitquant import Entry, untrained
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.training.presets import Preset
from comfyui_nibble.quant_core.training.reconstruct import TrainConfig

SMALL = {"captions": ("large red circle center on plain blue background",), "steps": 2, "samples": 2}
ROWS = [
    Entry("convrot", METHODS["convrot"]),
    untrained((1, "shared", "hadamard", "token", False)),
    untrained((4, "shared", "hadamard", "slice", False)),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick(entries):
    """With one smoothing and without GPTQ."""
    fast = lambda m: (
        replace(m, config=replace(m.config, smooth=((0.5, 0.5),), gptq=False))
        if m.name == "splitquant"
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
    assert {"image_db", "latent_db", "median_db"} <= convrot.keys()  # asked for
    assert convrot["median_db"] == pytest.approx(convrot["image_db"])  # of one picture
    best = max(rows, key=lambda row: row["coherent_db"])
    assert "image_db" in best
    assert sum("image_db" in row for row in rows) == 2
    assert not list(folder.glob("partial*"))


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


def test_trained_row(done):
    """Its layers are trained on the calibration's recorded calls, and no longer those of the untrained
    row."""
    folder, rows = done
    world = ablation.World.make(folder, 1.0, **SMALL)
    preset = Preset(TrainConfig(("bias", "scale"), steps=1, calls=2), None)
    trained = replace(quick(ROWS)[1], name="trained", levels=(), pictures=True, preset=preset)
    row = ablation.measure(world, trained, SMALL["captions"], SMALL["steps"])
    assert row["settings"]["training"]["blocks"]["steps"] == 1
    assert row["coherent_db"] != rows[1]["coherent_db"]
    assert abs(row["coherent_db"] - rows[1]["coherent_db"]) < 3
    assert row["image_db"] > 20
    assert not list(folder.glob("partial*"))


def test_table_and_picture(done, tmp_path):
    _, rows = done
    lines = ablation.ablation_text(rows).splitlines()
    assert lines[0].split() == " ".join(["row", *ablation.COLUMNS.values()]).split()
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        r["name"] for r in sorted(rows, key=lambda r: -r["coherent_db"])
    ]
    convrot = next(line for line in lines if line.startswith("convrot"))
    assert f"{rows[0]['coherent_db']:.2f}" in convrot
    assert "0.26%" in convrot
    assert next(line for line in lines if "by slices" in line).endswith(
        f"1: {rows[1]['coherent_db']:.2f} (1)  4: {rows[2]['coherent_db']:.2f} (1)"
    )
    plot(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_command(done, tmp_path, monkeypatch):
    _, rows = done
    asked = SimpleNamespace(args=None)
    monkeypatch.setattr(splitquant, "entries", lambda quick: ["quick"] * quick)
    monkeypatch.setattr(ablation, "run", lambda *args: setattr(asked, "args", args) or rows)
    result = CliRunner().invoke(
        app, ["ablate", "splitquant", "--out", str(tmp_path), "--quick", "--severity", "0.4"]
    )
    assert result.exit_code == 0, result.output
    assert asked.args[:3] == (tmp_path, ["quick"], 0.4)
    assert result.stdout == (tmp_path / "ablation.txt").read_text() == ablation.ablation_text(rows) + "\n"
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
