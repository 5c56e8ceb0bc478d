"""Processes of a cluster killed while they work, and a head that is gone: the file comes out the same."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.cluster import session
from comfyui_nibble.quant_core.cluster.session import TRIES
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.quant_core.cluster.test_session import content

pytest.importorskip("ray", reason="Ray is not installed: the extra [cluster] has it")
SOURCE, METHOD = tiny_flux.CHECKPOINT, METHODS["svdquant"]
CONFIG = METHOD.configured(rank=8, smooth=((0.5, 0.5),), low_rank=("plain",), iterations=0)
ROOT = str(Path(session.__file__).parents[3])
PATHS = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, calibration, one_thread):
    """What one process makes."""
    path = tmp_path_factory.mktemp("alone") / "q.safetensors"
    quantize_file(SOURCE, path, METHOD, CONFIG, Calibration(calibration))
    return content(path)


def at_work() -> dict[int, str]:
    """{process that this one has started: the layer that it fits}."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (folder / "cmdline").read_text().rstrip("\0")
            if name.startswith("ray::") and "_blocks." in name and os.getpid() in _parents(int(folder.name)):
                found[int(folder.name)] = name
    return found


def _parents(pid) -> list[int]:
    """The processes that have started it, the nearest first."""
    found: list[int] = []
    while pid > 1:
        status = (Path("/proc") / str(pid) / "status").read_text()
        pid = int(status.partition("PPid:")[2].split()[0])
        found.append(pid)
    return found


def test_processes_killed_at_ten_random_moments(tmp_path, calibration, alone, pair):
    chance, killed, over = random.Random(3), Counter(), threading.Event()

    def kill():
        while sum(killed.values()) < 10 and not over.is_set():
            time.sleep(chance.uniform(0, 0.3))
            left = [(pid, name) for pid, name in at_work().items() if killed[name] < TRIES - 1]
            if left:
                pid, name = chance.choice(left)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed[name] += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        out = tmp_path / "q.safetensors"
        quantize_file(SOURCE, out, METHOD, CONFIG, Calibration(calibration), workers=pair)
    finally:
        over.set()
        killer.join()
    assert sum(killed.values()) == 10
    assert content(out) == alone
    assert not Path(f"{out}.partial").exists()


def test_the_same_command_goes_on_after_the_head_is_gone(tmp_path, calibration, alone):
    """Killed with all its processes when three layers are done, the command with it; then started again."""
    out, partial = tmp_path / "q.safetensors", tmp_path / "q.safetensors.partial"
    command = [sys.executable, "-c", "from comfyui_nibble.quant_core.cli.commands import main; main()"]
    command += ["quantize", str(SOURCE), str(out), "--method", "svdquant", "--calibration", str(calibration)]
    command += ["--rank", "8", "--set", "smooth=[[0.5, 0.5]]", "--set", 'low_rank=["plain"]']
    command += ["--set", "iterations=0"]
    with head() as address, started([*command, "--ray", address]) as first:

        def three():
            assert first.poll() is None, first.stderr.read()
            return len(list(partial.glob("*.nibble.safetensors"))) >= 3

        until(three)
        os.killpg(first.pid, signal.SIGKILL)
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.nibble.safetensors")}
    assert 3 <= len(before) < 16
    kept = {}
    with head() as address, started([*command, "--ray", address]) as second:
        while second.poll() is None:
            for path in partial.glob("*.nibble.safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    kept[path.name] = path.stat().st_mtime_ns
            time.sleep(0.05)
        assert second.returncode == 0, second.stderr.read()
    assert {name: kept.get(name) for name in before} == before  # nothing was done twice
    assert content(out) == alone


@contextlib.contextmanager
def head():
    """The address of a Ray head with two CPUs, all of whose processes end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] % 5000 + 4000  # below the ports of Ray's workers
    command = ["start", "--head", "--port", str(port), "--num-cpus", "2", "--include-dashboard=false"]
    command += ["--disable-usage-stats", "--block"]
    with started([sys.executable, "-m", "ray.scripts.scripts", *command]) as process:

        def answers():
            assert process.poll() is None, process.stderr.read()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(answers)
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def started(command):
    """A process in a group of its own, which is killed at the end of the block."""
    # Ray asks for a token from 2.5x on; both sides of this test are on the loopback.
    env = os.environ | {"PYTHONPATH": PATHS, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, start_new_session=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(true, seconds=180):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)
