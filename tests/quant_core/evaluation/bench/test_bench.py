"""The bench: it runs without a GPU, finds a wrong kernel, and its arithmetic is right. No time is asserted
anywhere.

What runs kernels does so in processes of its own, which have Triton's interpreter.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from comfyui_nibble.kernels.cards import card_of
from comfyui_nibble.kernels.plan import lower
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.kernels.tuning import Problem, candidates
from comfyui_nibble.quant_core.evaluation.bench import (
    baselines,
    cases,
    machine,
    ours,
    run,
    timing,
)

QUANTIZERS = {"quantize", "quantize token", "quantize transform"}
COLUMNS = {"qgemm", "operator", "operator + LoRA", "operator channel", "split4"} | QUANTIZERS  # without a GPU


def python(code, cwd, interpret=True):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "XDG_CACHE_HOME": str(cwd),
        "OMP_NUM_THREADS": "1",
    }
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_without_a_gpu_compares_and_says_that_nothing_was_timed(tmp_path):
    call = """
        import sys
        from comfyui_nibble.quant_core.cli.commands import main
        sys.argv[1:] = ["bench", "--json", "deep/b.json", "--device", "cpu"]
        main()
    """
    done = python(call, tmp_path, interpret=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "deep"
    assert (out / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "Nothing was timed" in (out / "b.txt").read_text()
    assert (out / "b.txt").read_text() in done.stdout
    doc = json.loads((out / "b.json").read_text())
    assert doc["timed"] is False
    assert doc["command"] == "nibble bench --json deep/b.json --device cpu"
    assert [r["name"] for r in doc["rows"]] == [c.name for c in cases.TINY]
    for row in doc["rows"]:
        assert not row["failed"]
        assert row["cells"] == {}
        assert set(row["checks"]) == COLUMNS
        assert all(check["ok"] for found in row["checks"].values() for check in found.values())


def test_wrong_kernel_fails_the_case_and_is_not_timed(tmp_path):
    code = """
        import sys
        import torch
        from pathlib import Path
        from comfyui_nibble.quant_core.evaluation.bench import session, timing, verify
        from comfyui_nibble.quant_core.evaluation.bench.cases import Case
        right = verify.ours
        verify.ours = lambda *args: right(*args) + 1
        timing.ceilings = lambda *args: {}
        run = session.Session(torch.device("cpu"), Path("b.json"), "test", print)
        run.everything([Case("tiny", 16, 256, 3)], False, False)
        sys.exit(run.finish())
    """
    done = python(code, tmp_path)
    assert done.returncode == 1, done.stderr
    doc = json.loads((tmp_path / "b.json").read_text())
    assert [r["failed"] for r in doc["rows"]] == [True]
    assert doc["rows"][0]["cells"] == {}
    check = doc["rows"][0]["checks"]["operator"]["naive"]
    assert not check["ok"]
    assert check["error"] > check["limit"]
    text = (tmp_path / "b.txt").read_text()
    assert "1 with a wrong output" in text
    assert f"relative error {check['error']:.2g}" in text


def test_a_whole_run_with_a_made_up_clock(tmp_path):
    """All that a GPU's run does but the clock: columns, comfy-kitchen's calls, tuning, the model, targets, a
    column that raises."""
    code = """
        import sys
        import torch
        from pathlib import Path
        from comfyui_nibble.quant_core.evaluation.bench import baselines, model, session, timing, tune
        from comfyui_nibble.quant_core.evaluation.bench.cases import Case
        def clock(work, device):
            work.call(*work.operands)
            return timing.Timing(2.0, 1.5, 2.5, 0.1, 20, 1, len(timing.rotated(work, 10000)), True)
        def broken(*args):
            raise RuntimeError("no such\\nproduct")
        timing.measure = clock
        tune.tune.__defaults__ = (clock,)
        timing.ceilings = lambda *args: {"bf16_flops": lambda: 1e12, "int8_flops": lambda: 2e12, "bytes_per_s": broken}
        baselines.TORCH["torch fp8"] = broken
        small = model.Size(128, 2, 1, 1, 12, 5, 16, 32)
        model.Size = lambda: small
        run = session.Session(torch.device("cpu"), Path("b.json"), "test", print)
        run.doc["timed"] = True
        run.everything([Case("tiny", 48, 256, 20)], True, True)
        sys.exit(run.finish())
    """
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    doc = json.loads((tmp_path / "b.json").read_text())
    cells = doc["rows"][0]["cells"]
    assert cells.pop("torch fp8") == {"reason": "RuntimeError: no such product"}
    assert set(cells) == {"torch", "torch int8", *COLUMNS, *baselines.KITCHEN}
    assert all(c["ms"] == 2.0 and c["copies"] >= 1 for c in cells.values())
    assert cells["operator"]["speedup"] == 1.0
    assert cells["quantize"]["speedup"] is None
    assert cells["kitchen svdquant"]["note"] == "eager backend"
    assert doc["ceilings"]["bytes_per_s"] is None
    assert doc["rows"][0]["least_ms"] is None
    assert set(doc["model"]) == {"torch", "operator", "operator channel"}
    assert all(m["finite"] for m in doc["model"].values())
    assert len(doc["tuned"]) == 3
    assert all(t["best"] and all("ms" in c for c in t["candidates"]) for t in doc["tuned"])
    saved = json.loads(next((tmp_path / "comfyui_nibble").glob("tiles-*.json")).read_text())
    assert set(saved["tiles"]) == {t["key"] for t in doc["tuned"]}


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"device": "cpu", "tune": True}, "--tune"), ({"device": "cpu", "with_model": True}, "--model")],
)
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, asked, words):
    with pytest.raises(ValueError, match=words):
        run.run(json_path=tmp_path / "b.json", **asked)


def test_copies_exceed_twice_the_cache():
    assert timing.copies_needed(10, 50) == 11
    assert timing.copies_needed(101, 50) == 1
    assert timing.copies_needed(100, 50) == 2
    for nbytes in (1, 7, 99, 100, 101, 10**9):
        assert timing.copies_needed(nbytes, 50) * nbytes > 100
    x, columns = torch.arange(6.0).reshape(2, 3), torch.arange(6).reshape(2, 3).T
    work = timing.Work(lambda *args: None, (x, None, columns))
    assert work.nbytes == x.nbytes + columns.nbytes
    sets = timing.rotated(work, work.nbytes)
    assert len(sets) == 3
    for a, b, c in sets[1:]:
        assert torch.equal(a, x)
        assert a.data_ptr() != x.data_ptr()
        assert b is None
        assert c.stride() == columns.stride()


@pytest.mark.quick
def test_measure_queues_calls_over_all_copies(monkeypatch):
    """On a device that is not there: each event is a millisecond after the one before it."""
    log, clock = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)
            log.append("event")

        def elapsed_time(self, later):
            return float(later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 40)
    x = torch.zeros(8)  # 32 bytes: three copies
    found = timing.measure(timing.Work(lambda t: log.append(t.data_ptr()), (x,)), "cuda")
    # One sample of three calls in a millisecond is the estimate: a third of a millisecond a call, so one call
    # a sample.
    assert (found.ms, found.min_ms, found.p90_ms, found.group, found.copies, found.samples) == (
        1.0,
        1.0,
        1.0,
        1,
        3,
        timing.SAMPLES[1],
    )
    last = log[len(log) - log[::-1].index("sleep") :]
    calls = [item for item in last if not isinstance(item, str)]
    assert last[0] == "event"
    assert last[-1] == "wait"
    assert last.count("event") == found.samples + 1
    assert len(calls) == found.samples
    assert len(set(calls[:3])) == 3
    assert calls[3:6] == calls[:3]


@pytest.mark.quick
def test_median_and_percentile():
    assert timing.median([3, 1, 2]) == 2
    assert timing.median([4, 1, 2, 3]) == 2.5
    assert timing.percentile(range(1, 21), 0.9) == 18
    assert timing.percentile([5], 0.9) == 5


@pytest.mark.quick
@pytest.mark.parametrize("arch", [75, 80, 89, 90, 100, 120])
def test_every_case_has_a_kernel_of_one_launch_and_a_tile(arch):
    target = Target("cuda", arch, (3, 6))
    for case in {*cases.FULL, *cases.QUICK}:
        for column in cases.columns(target):
            if column.learned and arch == 75:
                assert "no 16-bit tensor-core product" in ours.refusal(column, case.n, case.k, target)
                continue
            assert ours.refusal(column, case.n, case.k, target) == ""
            (step,) = lower(column.spec(case.n, case.k), column.target(target))
            assert (step.planes > 0) == (column.int8 or not card_of("cuda", arch).int4)
            assert step.block == 0 or step.block % 32 == 0
            problem = Problem(
                step.kernel, step.planes, step.scales, step.swap, case.m, case.n, step.row_bytes, step.block
            )
            assert candidates(target, problem)


def test_commit_of_a_checkout(tmp_path):
    git = tmp_path / ".git"
    assert machine.commit(tmp_path) == ""
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert machine.commit(tmp_path) == ""
    (git / "packed-refs").write_text("# packed\n12ab refs/heads/main\n")
    assert machine.commit(tmp_path) == "12ab"
    (git / "refs/heads/main").write_text("34cd\n")
    assert machine.commit(tmp_path) == "34cd"
    tree, work = tmp_path / "tree", git / "worktrees/tree"
    tree.mkdir()
    work.mkdir(parents=True)
    (tree / ".git").write_text(f"gitdir: {work}\n")
    (work / "HEAD").write_text("ref: refs/heads/main\n")
    (work / "commondir").write_text("../..\n")
    assert machine.commit(tree) == "34cd"
    (git / "HEAD").write_text("56ef\n")
    assert machine.commit(tmp_path) == "56ef"
