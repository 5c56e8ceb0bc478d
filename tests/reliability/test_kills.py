"""Runs killed at random moments: nothing half under a final name, the same bytes when they go on, nothing
left over.

NIBBLE_KILLS=60 kills that many; CI fewer. What they came to is printed, with -rP.
"""

import re
import shutil
import signal
import time
from dataclasses import dataclass

import pytest

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.run.leftovers import leftovers
from comfyui_nibble.tests.reliability.runs import Run, contents, moments, run, size_of, small_inputs

LAYERS = 16
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Job:
    """arguments(folder): of the command, which writes below `folder`/out. source: what stands in `folder`
    before."""

    name: str
    arguments: object
    layers: bool = False  # whether its work is counted in layers


JOBS = [
    Job("rtn", lambda f: ["quantize", tiny_flux.CHECKPOINT, f / "out" / "q.safetensors", "--method", "rtn",
    "--device", "cpu"], True),
    Job("robuq, base 3", lambda f: ["quantize", tiny_flux.CHECKPOINT, f / "out" / "q.safetensors", "--method",
    "robuq", "--base3", "--device", "cpu"], True),
    Job("svdquant", lambda f: ["quantize", tiny_flux.CHECKPOINT, f / "out" / "q.safetensors", "--method",
    "svdquant", "--device", "cpu"], True),
    Job("convert", lambda f: ["convert", f / "native.safetensors", f / "out" / "c.safetensors", "--to",
    "native"]),
    Job("calibrate", lambda f: ["calibration", f / "out" / "c"]),
    Job("merge", lambda f: ["merge-calibrations", f / "out" / "m", f / "a", f / "b"]),
]  # fmt: skip
if size_of("NIBBLE_KILLS", 0) >= 60:  # a minute a run
    allocate = lambda f: [
        "allocate",
        tiny_flux.CHECKPOINT,
        f / "out" / "q.safetensors",
        "--calibration",
        f / "flux",
        "--budget",
        "A3",
        "--no-gptq",
    ]
    JOBS.append(Job("allocate", lambda f: [*allocate(f), "--device", "cpu"], True))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with what the jobs read."""
    folder = tmp_path_factory.mktemp("before")
    small_inputs(folder)
    if len(JOBS) > 6:
        assert run(["calibration_of_flux", folder / "flux"], folder / "log").code == 0
    (folder / "log").unlink()
    return folder


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_killed_at_any_moment(job, before, tmp_path):
    kills = -(-size_of("NIBBLE_KILLS", 12) // len(JOBS))
    whole, log = tmp_path / "whole", tmp_path / "log"
    shutil.copytree(before, whole)
    start = time.monotonic()
    ended = run(job.arguments(whole), log)
    seconds = time.monotonic() - start
    assert ended.code == 0, ended.text
    want = contents(whole / "out")
    codes = []
    for i, moment in enumerate(moments(kills, seconds, seed=len(job.name))):
        folder, number = tmp_path / f"{i}", SIGNALS[i % len(SIGNALS)]
        shutil.copytree(before, folder)
        going = Run(job.arguments(folder), log)
        if (ended := going.wait(moment)) is None:
            ended = going.kill(number)
        codes.append(ended.code)
        assert "Traceback" not in ended.text
        found = contents(folder / "out") if (folder / "out").exists() else {}
        grows = lambda name: job.name == "calibrate" or name.endswith(".json")  # sample by sample, row by row
        for name in [name for name in found if name in want and not grows(name)]:
            assert found[name] == want[name], f"half of {name} after signal {number}"
        pieces = list((folder / "out").glob("*.partial/*.nibble.safetensors"))
        again = run(job.arguments(folder), log)
        done = job.name == "merge" and found == want  # killed behind its last line; it writes over nothing
        assert again.code == 0 or (done and "is there already" in again.text), again.text
        assert contents(folder / "out") == want
        assert not list(leftovers(folder))
        if pieces:
            assert int(re.search(r"(\d+) finished pieces", again.text)[1]) == len(pieces)
        shutil.rmtree(folder)
    print(
        f"{job.name}: {kills} kills in {seconds:.1f} s, exit codes {codes}, 0 half files, 0 leftovers, "
        "same bytes"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_kill_cleans_up(number, tmp_path):
    """In the middle, several times: no temporary file and no lock stay, only finished layers."""
    for i in range(4):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        going = Run(
            [
                "quantize",
                tiny_flux.CHECKPOINT,
                folder / "q.safetensors",
                "--method",
                "svdquant",
                "--device",
                "cpu",
            ],
            tmp_path / "log",
        )
        deadline = time.monotonic() + 60
        while (
            len(list(folder.glob("*.partial/*.nibble.safetensors"))) < 1 + 3 * i
            and time.monotonic() < deadline
        ):
            time.sleep(0.003)
        assert going.kill(number).code in (128 + number, 1, 0), (
            "0: it had just ended; 1: typer says that it was aborted"
        )
        assert {p.name for p in folder.iterdir()} <= {"q.safetensors", "q.safetensors.partial"}
        left = [p.name for p in folder.glob("*.partial/*")]
        assert all(name.endswith((".nibble.safetensors", "nibble-unfinished.json")) for name in left), left
