"""Allocations judged by pictures: rows are what was asked for, and pairs are of the same picture."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.ablate import allocation
from comfyui_nibble.quant_core.evaluation.ablate.allocation import ALONE, GAINS, UNIFORM, Asked
from comfyui_nibble.quant_core.precision.menu import Entry, MixedConfig
from comfyui_nibble.quant_core.store.workers import HERE
from comfyui_nibble.tests.support import single_thread

ROUGH = (("smooth", ((0.5, 0.5),)), ("low_rank", ("plain",)), ("iterations", 0), ("clip", (1.0,)))
CONFIG = MixedConfig(
    tuple(Entry(f"robuq A{bits}", "robuq", (("activation_bits", bits), *ROUGH)) for bits in (2, 3)),
    rank=4,
    gptq=False,
)
SMALL = {
    "captions": ("large red circle center on plain blue background",),
    "steps": 2,
    "samples": 2,
    "seeds": (7,),
    "config": CONFIG,
}
ROWS = [Asked(UNIFORM, 2), Asked(GAINS, 2.5)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with single_thread():
        yield


@pytest.mark.quick
def test_rows():
    """Uniform bits only where they are whole."""
    assert [(a.bits, a.way) for a in allocation.asked((2, 2.5))] == [
        (2, UNIFORM),
        (2, GAINS),
        (2, ALONE),
        (2.5, GAINS),
        (2.5, ALONE),
    ]
    assert len({a.name for a in allocation.asked()}) == 8


def test_measured(tmp_path, monkeypatch):
    rows = allocation.run(tmp_path, rows=ROWS, calibrations=1, **SMALL)
    uniform, chosen = rows
    assert (uniform["reached"], set(uniform["layers"].values())) == (2, {"robuq A2"})
    assert 0.99 * 2.5 <= chosen["reached"] <= 2.5
    assert set(chosen["layers"].values()) == {"robuq A2", "robuq A3"}
    assert len(chosen["layers"]) == 12  # of the small FLUX, all but its modulations
    assert chosen["each_db"][0][0] > uniform["each_db"][0][0]
    # A stopped run goes on behind its last row, and neither calibrates nor fits for a whole one.
    path = tmp_path / "rows.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"layers": kept["layers"][:1]}))
    again = allocation.run(tmp_path, rows=ROWS, calibrations=1, **SMALL)
    assert again == rows
    monkeypatch.setattr(allocation.World, "make", lambda *_, **__: pytest.fail("calibrated again"))
    assert allocation.run(tmp_path, rows=ROWS, calibrations=1, **SMALL) == rows


def made_up(bits, way, *calibrations):
    return [
        {"bits": bits, "way": way, "reached": bits, "median_db": each[0], "each_db": [each[:2], each[2:]]}
        for each in calibrations
    ]


@pytest.mark.quick
def test_text():
    """Pairs are of one calibration, and the spread is over calibrations."""
    rows = [
        *made_up(2, UNIFORM, [20.0, 21.0, 22.0, 23.0], [30.0, 31.0, 32.0, 33.0]),
        *made_up(2, GAINS, [21.0, 22.0, 23.0, 24.0], [33.0, 34.0, 35.0, 36.0]),
        *made_up(2.5, GAINS, [25.0] * 4, [35.0] * 4),
    ]
    lines = allocation.allocation_text(rows).splitlines()
    assert lines[1].split()[:6] == ["2", "bits,", "every", "layer", "the", "same"]
    assert lines[1].split()[6:] == ["2.000", "20.00", "/", "30.00", "dB"]
    assert lines[-1].startswith(f"2 bits, {GAINS} over {UNIFORM}: +2.00 dB (")  # of four ones and four threes
    assert lines[-1].endswith("better in 8 of 8; over calibrations 1.41")
    assert sum("better in" in line for line in lines) == 1


@pytest.mark.quick
def test_command(tmp_path, monkeypatch):
    asked = SimpleNamespace(args=None)
    rows = made_up(2, UNIFORM, [20.0, 21.0, 22.0, 23.0])
    monkeypatch.setattr(
        allocation, "run", lambda *args, **options: setattr(asked, "args", (args, options)) or rows
    )
    command = ["ablate", "allocation", "--out", str(tmp_path), "--severity", "0.4", "--calibrations", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (asked.args[0][:2], asked.args[1]) == ((tmp_path, 0.4), {"calibrations": 2, "workers": HERE})
    assert (
        result.stdout
        == (tmp_path / "allocation.txt").read_text()
        == (allocation.allocation_text(rows) + "\n")
    )
