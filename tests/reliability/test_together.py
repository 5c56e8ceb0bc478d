"""Two processes on one destination: one writes, the other is told which; never a mixture. NIBBLE_PAIRS=24
runs that many pairs."""

import random
import time

import pytest

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.run.leftovers import leftovers
from comfyui_nibble.tests.reliability.runs import Run, contents, run, size_of

PAIRS = [("robuq", "rtn"), ("rtn", "convrot"), ("rtn", "rtn")]
CALIBRATIONS = [("12", "12"), ("12", "13")]


def quantizing(method, out):
    return ["quantize", tiny_flux.CHECKPOINT, out, "--method", method, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{method: what it writes}."""
    folder = tmp_path_factory.mktemp("whole")
    for method in {m for pair in PAIRS for m in pair}:
        assert run(quantizing(method, folder / method / "q.safetensors"), folder / "log").code == 0
    return {m: contents(folder / m) for pair in PAIRS for m in pair}


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_quantizations(pair, whole, tmp_path):
    for i in range(-(-size_of("NIBBLE_PAIRS", 6) // len(PAIRS))):
        out, draw = tmp_path / f"{i}" / "q.safetensors", random.Random(i)
        out.parent.mkdir()
        going = []
        for j, method in enumerate(pair):
            going.append(Run(quantizing(method, out), tmp_path / f"log{j}"))
            time.sleep(draw.uniform(0, 0.5))
        ended = [g.wait(300) for g in going]
        fine = [m for m, e in zip(pair, ended, strict=True) if e.code == 0]
        assert fine, [e.text for e in ended]
        assert contents(out.parent) in [whole[m] for m in fine]
        assert PackFile(out).provenance["method"] in fine
        for e in ended:
            told = (
                "another run is writing this (process" in e.text or "finished pieces of another run" in e.text
            )
            assert e.code == 0 or (e.code == 1 and told and "Traceback" not in e.text), e.text
        assert [p.name for p in out.parent.iterdir()] == ["q.safetensors"]


@pytest.mark.parametrize("steps", CALIBRATIONS, ids="+".join)
def test_two_calibrations(steps, tmp_path):
    alone = {}
    for s in set(steps):
        assert run(["calibration", tmp_path / s, s], tmp_path / "log").code == 0
        alone[s] = contents(tmp_path / s)
    out = tmp_path / "c"
    going = [Run(["calibration", out, s], tmp_path / f"log{i}") for i, s in enumerate(steps)]
    ended = [g.wait(300) for g in going]
    fine = [s for s, e in zip(steps, ended, strict=True) if e.code == 0]
    assert contents(out) in [alone[s] for s in fine]
    assert all(
        e.code == 0 or "another run is writing this" in e.text or "another calibration" in e.text
        for e in ended
    ), [e.text for e in ended]
    assert not list(leftovers(tmp_path))
