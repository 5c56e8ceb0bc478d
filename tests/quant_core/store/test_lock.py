import json
import os
import socket
import subprocess
import sys

import pytest

from comfyui_nibble.quant_core.store.lock import Busy, is_held, only_run

OTHER = """
import sys
from pathlib import Path
from comfyui_nibble.quant_core.store.lock import only_run
with only_run(Path(sys.argv[1]), "quantizes m.safetensors with rtn"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def other(target):
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_another_run_is_named(tmp_path):
    target, process = tmp_path / "models" / "q.safetensors", other(tmp_path / "models" / "q.safetensors")
    who = (
        rf"q.safetensors: another run is writing this \(process {process.pid} on {socket.gethostname()}, "
        r"since 20.*, quantizes m.safetensors"
    )
    with (
        pytest.raises(Busy, match=who + r" with rtn\)\. Wait for it or stop it, or choose another place"),
        only_run(target, "x"),
    ):
        pass
    assert is_held(target.with_name(".q.safetensors.nibble-lock"))
    process.communicate("\n")
    with only_run(target, "x"):
        assert json.loads(target.with_name(".q.safetensors.nibble-run").read_text())["pid"] == os.getpid()
    assert not list(target.parent.iterdir())


def test_a_killed_run_holds_nothing(tmp_path):
    process = other(tmp_path / "q")
    process.kill()
    process.wait()
    assert not is_held(tmp_path / ".q.nibble-lock")
    with only_run(tmp_path / "q", "x"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_two_runs_within_a_process_are_kept_apart(tmp_path):
    with only_run(tmp_path / "q", "the first"):
        with pytest.raises(Busy, match="the first"), only_run(tmp_path / "q", "the second"):
            pass
        with only_run(tmp_path / "r", "another target"):
            pass
    with only_run(tmp_path / "q", "the third"):
        pass


def test_many_processes_are_never_inside_together(tmp_path):
    """Each appends its start and its end: they never interleave, whoever removes the lock's file."""
    script = """
import sys, time
from pathlib import Path
from comfyui_nibble.quant_core.store.lock import Busy, only_run
target, log, done = Path(sys.argv[1]), open(sys.argv[2], "a"), 0
deadline = time.monotonic() + 60
while done < 40 and time.monotonic() < deadline:
    try:
        with only_run(target, "x"):
            log.write("in\\n"); log.flush()
            log.write("out\\n"); log.flush()
            done += 1
    except Busy:
        pass
assert done == 40
"""
    log = tmp_path / "log"
    run = [sys.executable, "-c", script, str(tmp_path / "q"), str(log)]
    processes = [subprocess.Popen(run) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert log.read_text() == "in\nout\n" * 120


@pytest.mark.quick
def test_names_as_long_as_a_file_system_takes(tmp_path):
    with only_run(tmp_path / ("n" * 250), "x"):
        pass
    assert not list(tmp_path.iterdir())
