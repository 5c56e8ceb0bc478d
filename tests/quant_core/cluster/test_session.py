"""Work on a real Ray cluster of this machine: the same bytes with any number of workers, and what becomes of
errors, lost processes and items that fit nowhere."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.cli.allocate import allocate_file
from comfyui_nibble.quant_core.cli.guard import guard_file
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.cluster import session
from comfyui_nibble.quant_core.cluster.session import ClusterError, connected
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.precision.allocate import Budget
from comfyui_nibble.quant_core.precision.guarding import Asked
from comfyui_nibble.quant_core.store import digests
from comfyui_nibble.tests.quant_core.cli.test_allocate import CONFIG
from comfyui_nibble.tests.quant_core.cluster import work

pytest.importorskip("ray", reason="Ray is not installed: the extra [cluster] has it")
SOURCE = tiny_flux.CHECKPOINT
METHOD = METHODS["svdquant"]
FAST = METHOD.configured(rank=8, smooth=((0.5, 0.5),), low_rank=("plain",), iterations=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, calibration, one_thread):
    """What one process makes."""
    return _made(tmp_path_factory.mktemp("alone"), calibration)


def _made(folder, calibration, **workers):
    """The files that quantize, allocate and guard write."""
    statistics = Calibration(calibration)
    paths = [folder / f"{name}.safetensors" for name in ("quantized", "allocated", "guarded")]
    quantize_file(SOURCE, paths[0], METHOD, FAST, statistics, **workers)
    allocate_file(SOURCE, paths[1], statistics, Budget("activation", 3.0), CONFIG, **workers)
    asked = Asked("memory", 0, allowed=("W4A8",))
    guard_file(SOURCE, paths[0], paths[2], statistics, asked, **workers)
    return paths


def content(path) -> bytes:
    """The file without what a layer took in seconds, and the hash of that."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    about = json.loads(header["__metadata__"].pop("nibble"))
    for row in about["report"]:
        del row["seconds"]
    hashes = json.loads(header["__metadata__"].pop(digests.ENTRY))
    del hashes["description"]
    return json.dumps([header, about, hashes]).encode() + data[start:]


def test_the_same_bytes_as_one_process(tmp_path, calibration, alone, cluster):
    for ours, theirs in zip(_made(tmp_path, calibration, workers=cluster), alone, strict=True):
        assert content(ours) == content(theirs), ours.name
    assert not list(tmp_path.glob("*.partial"))


LOCAL = """
import os, sys
sys.path.insert(0, sys.argv[1])
from comfyui_nibble.quant_core.cluster import session
from comfyui_nibble.quant_core.cluster.session import connected
def where(item):
    import comfyui_nibble
    return comfyui_nibble.__path__[0]
with connected("local") as cluster:
    assert "PYTHONPATH" not in os.environ
    print(*cluster.map(where, [1], str, lambda item: 1))
"""


def test_processes_of_a_local_cluster_find_the_pack(tmp_path):
    """Where it lies, though it is neither installed nor in the folder that the command is called in."""
    root = Path(session.__file__).parents[3]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", LOCAL, str(root)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(Path(session.__file__).parents[2])]


def test_all_of_the_items_the_largest_first(pair):
    started = list(pair.map(work.square, [1, 2, 3, 4, 5], str, lambda i: i))
    assert sorted(started) == [1, 4, 9, 16, 25]


def test_an_error_of_a_task_names_the_item_and_the_machine(pair):
    with pytest.raises(ClusterError, match=r"^layer 3, on [\d.]+: no luck with 3$"):
        list(pair.map(work.unlucky, [1, 2, 3], "layer {}".format, lambda i: 1))


def test_an_item_that_fits_no_machine_is_refused_before_anything_begins(pair):
    with pytest.raises(
        ClusterError, match=r"^the large one: takes 1 CPUs, 2 GPUs and 1000000.0 GB of memory"
    ):
        list(pair.map(work.unlucky, [10**15], lambda i: "the large one", lambda i: i))


def test_a_process_that_is_lost_is_replaced(tmp_path, pair):
    """Each item's process kills itself the first time."""
    found = pair.map(work.Suicidal(tmp_path), list(range(4)), str, lambda i: 1)
    assert sorted(found) == [0, 1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_process_that_is_lost_every_time_ends_the_work(pair):
    with pytest.raises(ClusterError, match=r"^7: its process was lost 4 times"):
        list(pair.map(work.dies, [7], str, lambda i: 1))


@pytest.fixture
def interruptible():
    """What a shell without job control runs in the background ignores SIGINT, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_what_runs_and_frees_the_workers(pair, interruptible):
    """Two tasks of ten minutes each are under way."""
    results = pair.map(work.slow, [0, 600, 600], "{} seconds".format, lambda seconds: 1)
    assert next(results) == 0
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert sorted(pair.map(work.square, [1, 2], str, lambda i: 1)) == [1, 4]


@pytest.mark.quick
def test_no_cluster_at_an_address():
    with (
        pytest.raises(ClusterError, match=r"--ray 127.0.0.1:1: no Ray cluster there .*--ray local"),
        connected("127.0.0.1:1"),
    ):
        pass
