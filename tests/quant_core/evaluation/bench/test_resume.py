"""`nibble bench` in a file: cases that hang, die or are wrong are written down and not tried again, a run
that is killed goes on, figures of another machine stay apart. The tasks are made up; processes are real."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from comfyui_nibble.quant_core.evaluation.bench import run, worker
from comfyui_nibble.tests.quant_core.evaluation.bench.made_up import NAMES, child

PARENT = textwrap.dedent(
    """
    import sys
    import torch

    def touched(*args, **kwargs):
        raise AssertionError("the parent has touched the device")

    for name in ("_lazy_init", "is_available", "device_count", "current_device", "synchronize"):
        setattr(torch.cuda, name, touched)
    from comfyui_nibble.quant_core.evaluation.bench.run import run
    from comfyui_nibble.tests.quant_core.evaluation.bench.made_up import child
    sys.exit(run("cpu", sys.argv[1], True, echo=lambda text: print(text, flush=True), child=child()))
    """
)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A function: runs it with tasks of these kinds, and gives (exit code, what it said, the cases)."""

    def go(minutes=9.0, limit=60.0, machine=None, **kinds):
        monkeypatch.setenv("KINDS", json.dumps({f"case {n[1:]}": kind for n, kind in kinds.items()}))
        monkeypatch.setenv("MADE_UP", json.dumps(machine or {}))
        monkeypatch.setenv("LIMIT", str(limit))
        said = []
        code = run.run("cpu", tmp_path / "b.json", True, minutes, said.append, child(), "nibble bench")
        return code, "\n".join(said), cases_in(tmp_path / "b.json")

    return go


def cases_in(path, which=-1):
    return json.loads(path.read_text())["runs"][which]["cases"]


def test_what_hangs_dies_or_is_wrong_is_written_down_and_not_tried_again(bench):
    kinds = {"_1": "hangs", "_2": "dies", "_3": "wrong", "_4": "refused", "_5": "raises"}
    code, said, first = bench(limit=3, **kinds)
    assert code == 1
    states = [first[name]["state"] for name in NAMES]
    assert states == ["done", "hangs", "died", "wrong", "refused", "failed", "done", "done"]
    at = [first[f"case {i}"].get("at") for i in (1, 2, 3)]
    assert at == [
        {"what": "waiting", "tile": {"bm": 128}},
        {"what": "falling", "tile": {"bm": 256}},
        {"what": "comparing", "tile": {"bm": 32}},
    ]
    assert first["case 1"]["reason"] == "no answer in 3 s"
    assert first["case 2"]["reason"] == "the process ended, exit code 3: no such address"
    assert first["case 3"]["result"] == {"error": 0.5}
    assert first["case 5"]["reason"] == "RuntimeError: the device is lost"
    # A new process after each that was lost; cases of a group get the results before them.
    processes = [first[name]["result"]["process"] for name in ("case 0", "case 6", "case 7")]
    assert processes[1] == processes[2] != processes[0]
    assert [first[name]["result"]["group"] for name in ("case 0", "case 6", "case 7")] == [0, 1, 2]
    assert "case 1: hangs, no answer in 3 s, at {'what': 'waiting', 'tile': {'bm': 128}}" in said

    again, said, second = bench(limit=3, **kinds)
    assert again == 1
    assert second == first
    assert "kept from an earlier run: 8 of 8 cases" in said
    assert "not tried again: case 2: died" in said


def test_figures_of_another_machine_card_or_version_stay_apart(bench, tmp_path):
    _, _, first = bench()
    for other in ({"host": "there"}, {"torch": "3"}, {"uuid": "x"}, {"triton": "4"}, {"sources": "y"}):
        _, said, found = bench(machine=other)
        assert "kept" not in said
        assert "of another machine, card or version" in said
        assert {c["result"]["process"] for c in found.values()}.isdisjoint(
            c["result"]["process"] for c in first.values()
        )
    assert cases_in(tmp_path / "b.json", 0) == first
    _, said, _ = bench()
    assert "kept from an earlier run: 8 of 8 cases" in said
    assert len(json.loads((tmp_path / "b.json").read_text())["runs"]) == 6


def test_nothing_is_begun_that_would_take_longer_than_is_left(bench, monkeypatch):
    code, said, found = bench(minutes=0)
    assert (code, found) == (0, {})
    assert "8 of 8 cases are left for the next run" in said
    monkeypatch.setenv("PAUSE", "1000")
    code, said, found = bench(minutes=0.1)
    assert (code, found) == (0, {})  # what was cut is no fault
    monkeypatch.setenv("PAUSE", "0")
    assert set(bench()[2]) == set(NAMES)


def started(path, pause):
    env = os.environ | {"PAUSE": str(pause), "KINDS": "{}", "MADE_UP": "{}", "LIMIT": "60"}
    command = [sys.executable, "-c", PARENT, str(path)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_dry_run_that_is_killed_twice_goes_on(tmp_path):
    """Killed after 2 and after 5 cases, the third run gives the set of cases of an undisturbed one. Nor does
    the parent touch the device: it could not end a process that hangs there if it hung itself."""
    path, whole, left = tmp_path / "b.json", tmp_path / "whole.json", []
    for count in (2, 5):
        process = started(path, 0.5)
        for line in process.stdout:
            answered = line.rstrip().endswith("ms") and [c for c in cases_in(path).values() if "result" in c]
            if answered and len(answered) >= count:
                break
        process.kill()
        process.wait()
        found = cases_in(path)
        done = {name: entry for name, entry in found.items() if entry["state"] == "done"}
        assert len(done) >= count
        assert left == [] or left[-1].items() <= done.items()  # nothing is lost
        left.append(done)
        assert not list(tmp_path.glob("*.tmp*"))
    last = started(path, 0)
    said, _ = last.communicate()
    assert last.returncode == 0, said
    assert f"kept from an earlier run: {len(left[-1])} of 8 cases" in said
    undisturbed = started(whole, 0)
    undisturbed.communicate()
    strip = lambda found: {
        name: (c["state"], c["kind"], c["given"], c["result"]["name"]) for name, c in found.items()
    }
    assert strip(cases_in(path)) == strip(cases_in(whole))
    assert list(strip(cases_in(path))) == NAMES
    processes = {entry["result"]["process"] for entry in cases_in(path).values()}
    deadline = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, processes))  # a parent that was killed leaves no child behind


def alive(pid):
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def test_a_case_that_takes_the_run_along_twice_is_not_tried_again(bench, tmp_path):
    """As one does that stops the driver or the machine."""
    _, _, found = bench()
    doc = json.loads((tmp_path / "b.json").read_text())
    for tries, state in ((1, "done"), (2, "died")):
        kept = {key: found["case 3"][key] for key in ("kind", "given", "group")}
        doc["runs"][0]["cases"]["case 3"] = kept | {"state": "begun", "tries": tries}
        (tmp_path / "b.json").write_text(json.dumps(doc))
        assert bench()[2]["case 3"]["state"] == state


def test_a_file_of_something_else_is_refused_and_stays(tmp_path):
    path = tmp_path / "b.json"
    for text in ('{"machine": {}}', "no JSON", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="Name another file"):
            run.run("cpu", path, child=child(), echo=lambda text: None)
        assert path.read_text() == text


def test_numbers_that_json_lacks():
    found = worker.finite({"a": [float("nan"), 1.0], "b": (float("inf"),)})
    assert found == {"a": [None, 1.0], "b": [None]}
