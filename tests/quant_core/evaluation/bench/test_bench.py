"""The bench: it runs without a GPU, finds a wrong kernel, and its arithmetic is right. No time is asserted
anywhere.

What runs kernels does so in processes of its own, which have Triton's interpreter.
"""

import json
import sys
from dataclasses import replace

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
    plan,
    run,
    timing,
)
from comfyui_nibble.quant_core.evaluation.bench.child import Child
from comfyui_nibble.quant_core.evaluation.bench.document import document

QUANTIZERS = {"quantize", "quantize token", "quantize transform"}
COLUMNS = {"qgemm", "operator", "operator + LoRA", "operator channel", "split4"} | QUANTIZERS  # without a GPU


SMALL = """
import sys
import torch
from comfyui_nibble.quant_core.evaluation.bench import baselines, model, plan, tasks, timing, tune, verify, worker
from comfyui_nibble.quant_core.evaluation.bench.cases import Case

size = model.Size(hidden=128, heads=2, double=1, single=1, image=16, text=5, channels=16, context=32)
few = (Case("tiny", 48, 256, 20),)
SIZES = plan.Sizes(few, few, few, size, size, ((48, 256),), (16,))
"""
# On a card that is not there: what runs is Triton's interpreter with a clock that always says the same.
CARD = """
def clock(work, device):
    work.call(*work.operands)
    return timing.Timing(2.0, 1.5, 2.5, 0.1, 20, 1, len(timing.rotated(work, 10000)), True)

def broken(*args):
    raise RuntimeError("no such\\nproduct")

timing.measure = clock
tune.Candidates.__init__.__defaults__ = (clock,)
timing.ceilings = lambda *args: {"bf16_flops": lambda: 1e12, "int8_flops": lambda: 2e12, "bytes_per_s": broken}
baselines.TORCH["torch fp8"] = broken

class Card(tasks.Tasks):
    def machine(self, given, group, say):
        found = super().machine(given, group, say)
        wanted = plan._on_card(self.target, 80e9, given["everything"], self.sizes)
        cases = {case.id: case for case in wanted if case.kind not in ("host", "fit", "calibration")}
        found["machine"]["backend"] = "made up"
        return found | {"cases": [case.to_json() for case in cases.values()]}

made = Card("cpu", SIZES)
made.table["machine"] = made.machine
"""
SERVE = "\nworker.serve(lambda device: (made.table, made.usable), 'cpu')\n"


class InInterpreter(Child):
    """Whose cases all run there."""

    def ask(self, case, group, end=float("inf")):
        return super().ask(replace(case, interpret=True), group, end)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function: runs the bench with a child of this code, and gives its exit code, the document that is
    printed, and the text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def go(code, everything=False, kind=Child):
        path, command = tmp_path / "deep/b.json", [sys.executable, "-c", SMALL + code + SERVE]
        done = run.run("cpu", path, everything, 9, lambda text: None, kind(command), "nibble bench")
        (held,) = json.loads(path.read_text())["runs"]
        return done, document(held), path.with_suffix(".txt").read_text()

    return go


def test_without_a_gpu_kernels_are_compared_and_the_cpu_is_timed(measured, tmp_path):
    done, doc, text = measured("made = tasks.Tasks('cpu', SIZES)")
    assert done == 0, text
    assert (tmp_path / "deep/b.png").read_bytes().startswith(b"\x89PNG")
    assert "No kernel was timed" in text
    assert doc["timed"] is False
    (row,) = doc["rows"]
    assert not row["failed"]
    assert row["cells"] == {}
    assert set(row["checks"]) == COLUMNS
    assert all(check["ok"] for found in row["checks"].values() for check in found.values())
    (layer,) = doc["cpu"].values()
    names = [f"{grain}, {form}" for grain in ("group", "channel") for form in ("as stored", "at load")]
    assert list(layer["result"]) == ["torch fp32", "torch bf16", *names]
    assert all(cell["ms"] > 0 and cell["samples"] >= 3 for cell in layer["result"].values())
    assert all(layer["result"][f"{grain}, at load"]["error"] < 0.3 for grain in ("group", "channel"))
    steps = {name: entry["result"] for name, entry in doc["model"].items()}
    assert set(steps) == {
        f"model {name}, 16 tokens"
        for name in ("torch float32", "torch bfloat16", "group float32", "channel float32")
    }
    assert all(found["finite"] and found["ms"] > 0 for found in steps.values())
    (host,) = doc["host"].values()
    assert host["result"]["plain"]["layers"] == host["result"]["LoRA"]["layers"] == 304
    assert "ms a step of FLUX.1, 304 layers" in text
    assert f"{doc['machine']['threads']} threads of {doc['machine']['processor']}" in text


def test_wrong_kernel_fails_the_case_and_is_not_timed(measured):
    code = """
right = verify.ours
verify.ours = lambda *args: right(*args) + 1
"""
    done, doc, text = measured(CARD.replace("made =", code + "made ="), True, InInterpreter)
    assert done == 1
    (row,) = doc["rows"]
    assert row["failed"]
    assert all("relative error" in row["cells"][name]["reason"] for name in COLUMNS - QUANTIZERS)
    check = row["checks"]["operator"]["naive"]
    assert not check["ok"]
    assert check["error"] > check["limit"]
    assert "1 with a wrong output" in text
    assert f"relative error {check['error']:.2g}" in text
    fault = doc["faults"]["check tiny 48 x 256, M 20: operator"]
    assert fault["state"] == "wrong"
    assert fault["at"]["tile"]["bm"] == 32


def test_a_whole_run_with_a_made_up_clock(measured, tmp_path):
    """All that a GPU's run does but the clock: columns, comfy-kitchen's calls, tuning, the model, a baseline and
    a ceiling that raise."""
    done, doc, text = measured(CARD, True, InInterpreter)
    assert done == 1, text  # the ceiling that raises
    assert {name: entry["state"] for name, entry in doc["faults"].items()} == {
        "ceiling bytes_per_s": "failed"
    }
    (row,) = doc["rows"]
    cells = row["cells"]
    assert cells.pop("torch fp8") == {"reason": "RuntimeError: no such product"}
    assert set(cells) == {"torch", "torch int8", *COLUMNS, *baselines.KITCHEN}
    assert all(c["ms"] == 2.0 and c["copies"] >= 1 for c in cells.values())
    assert cells["operator"]["speedup"] == 1.0
    assert cells["quantize"]["speedup"] is None
    assert cells["kitchen svdquant"]["note"] == "eager backend"
    assert cells["operator"]["sensors"] == {"reason": "no card"}
    assert row["least_ms"] is None
    steps = {name.removeprefix("model "): entry for name, entry in doc["model"].items()}
    where = [f"{side} x {side}, batch {batch}" for batch in (1, 2) for side in (64, 32)]
    ours = [
        f"{grain}{lora}, {at}" for lora in ("", " + LoRA") for grain in ("group", "channel") for at in where
    ]
    assert list(steps) == [f"torch, {at}" for at in where] + ours + [f"{name}, tuned" for name in ours]
    assert all(entry["result"]["finite"] for entry in steps.values())
    tuned = [entry["result"] for entry in doc["tuned"].values()]
    assert len({entry["group"] for entry in doc["tuned"].values()}) == 3
    assert all(t["ms"] == 2.0 and t["best"] for t in tuned)
    saved = json.loads(next((tmp_path / "comfyui_nibble").glob("tiles-*.json")).read_text())
    assert {f"tune {key}" for key in saved["tiles"]} == {entry["group"] for entry in doc["tuned"].values()}


@pytest.mark.parametrize("arch", [75, 80, 89, 90, 120])
@pytest.mark.parametrize("memory", [12e9, 80e9])
def test_the_order_of_a_card(arch, memory):
    """Correctness of the default tiles, the model's step, what stands beside, fits, tuning, the rest."""
    target = Target("cuda", arch, (3, 6))
    found = plan.planned(target, memory, True)
    assert len({case.id for case in found}) == len(found)
    stages = list(dict.fromkeys(case.kind for case in found))
    order = ["ceiling", "check", "host", "model", "baseline", "time", "fit", "calibration", "tune"]
    assert stages == order
    first = next(case for case in found if case.kind == "model")
    assert ("quarter" in first.id) is (memory < plan.WHOLE_MODEL_BYTES)
    checked = {case.id for case in found[: found.index(first)] if case.kind == "check"}
    assert len(checked) == 3 * len(cases.QUICK)
    # What comes before the layers beside comfy-kitchen is measured without --all, and takes half of the time.
    short = plan.planned(target, memory, False)
    assert [case.id for case in short] == [case.id for case in found[: len(short)]]
    assert {case.kind for case in short} == {"ceiling", "check", "host", "model"}
    assert sum(case.seconds for case in short) < 0.5 * 60 * run.MINUTES
    ids = [case.id for case in found]
    assert all(not case.needs or ids.index(case.needs) < ids.index(case.id) for case in found)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PyTorch finds no GPU"):
        run.run("cuda", tmp_path / "b.json", echo=lambda text: None)
    assert not (tmp_path / "b.json").exists()


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
