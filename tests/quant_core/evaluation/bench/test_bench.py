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
from torch.nn import functional as F

from comfyui_nibble.kernels.cards import card_of
from comfyui_nibble.kernels.plan import lower
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.kernels.tuning import Problem, candidates
from comfyui_nibble.quant_core.evaluation.bench import (
    baselines,
    cases,
    machine,
    model,
    ours,
    report,
    run,
    timing,
)
from comfyui_nibble.quant_core.evaluation.bench.cases import Case
from comfyui_nibble.tests.support import relative_error

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
def test_least_time_is_the_slower_of_products_and_memory():
    ceilings = {"int8_flops": 2e12, "bytes_per_s": 1e9}
    assert report.least_ms(4e12, 1e9, ceilings) == 2000
    assert report.least_ms(4e12, 5e9, ceilings) == 5000
    assert report.least_ms(1, 1, {"int8_flops": None, "bytes_per_s": 1}) is None
    case = Case("any", 8, 16, 4)
    assert case.flops == 1024
    assert case.least_bytes == 2 * 64 + 2 * 32 + 64


def timed(ms):
    return report.cell(timing.Timing(ms, ms, ms, 0.1, 20, 1, 2, True), 10**12, 3.0)


def made_up_row(n, k, m=cases.FLUX_TOKENS, **ms):
    case = Case("FLUX", n, k, m)
    cells = {name.replace("_", " "): timed(v) if v else report.refused("not here") for name, v in ms.items()}
    return vars(case) | {"name": case.name, "least_ms": 1.0, "failed": False, "checks": {}, "cells": cells}


@pytest.mark.quick
def test_targets():
    n, k, m = 9216, 3072, cases.FLUX_TOKENS
    wide = made_up_row(
        n,
        k,
        torch=3.0,
        torch_int8=1.8,
        qgemm=2.0,
        operator=2.0,
        split4=2.2,
        quantize_token=1.0,
        quantize_transform=1.05,
    )
    wide["cells"]["operator + LoRA"] = timed(2.08)
    narrow = made_up_row(3072, k, torch=2.5, torch_int8=None, qgemm=1.5, operator=2.0, split4=1.5)
    other = made_up_row(n, k, 256, torch=3.0, operator=1.0)
    ceiling = 2000 * m * n * k / 2.0 / 0.65
    found = report.targets([wide, narrow, other], {"int8_flops": ceiling}, 90)
    stated = {(t["case"], t["target"]): (t["value"], t["met"]) for t in found}
    assert len(stated) == len(found) == 14
    at = lambda row, start: next(
        v for (case, target), v in stated.items() if case == row["name"] and target.startswith(start)
    )
    assert at(wide, "operator at least 1.5 x torch") == (1.5, True)
    assert at(wide, "qgemm at least 0.9") == (0.9, True)
    assert at(wide, "qgemm at least 0.65") == (pytest.approx(0.65), True)
    assert at(wide, "operator at most 1.12") == (1.0, True)
    assert at(wide, "a LoRA of rank 32 at most 1.05") == (1.04, True)
    assert at(wide, "split4 at most 1.05") == (1.1, False)
    assert at(wide, "transform and quantize at most 1.1") == (1.05, True)
    assert at(narrow, "transform and quantize at most 1.1") == (None, None)
    assert at(narrow, "operator at least 1.3 x torch") == (1.25, False)
    assert at(narrow, "qgemm at least 0.9") == (None, None)
    assert at(narrow, "operator at most 1.12") == (pytest.approx(4 / 3), False)
    assert report.targets([wide], {"int8_flops": ceiling}, 89) == []


@pytest.mark.quick
def test_text_of_numbers_and_refusals():
    assert report.cell_text(report.refused("no FP8 products here")) == "refused: no FP8 products here"
    assert report.cell_text(timed(2.0)) == "   2.0000 ms (min 2.0000, p90 2.0000)    500.0 TFLOP/s   1.50 x"
    row = made_up_row(3072, 3072, torch=3.0, torch_fp8=None, qgemm=2.0)
    row["checks"] = {
        "qgemm": {
            "naive": {"ok": False, "error": 0.5, "worst": None, "finite": False},
            "eager": report.refused("out of memory"),
        }
    }
    facts = dict.fromkeys(("driver", "cuda", "comfy_kitchen", "commit"), "") | {
        "device": "Card",
        "backend": "cuda",
        "arch": 90,
    }
    doc = {
        "machine": facts | {"torch": "2", "triton": "3"},
        "date": "today",
        "command": "nibble bench",
        "dtype": "bfloat16",
        "timed": True,
    }
    doc |= {
        "ceilings": {"bf16_flops": 6e14, "int8_flops": None, "bytes_per_s": 3e12},
        "rows": [row],
        "errors": ["split4: out of memory"],
    }
    doc |= {"model": {"torch": report.refused("too large")}, "targets": report.targets([row], {}, 90)}
    text = report.as_text(doc)
    for line in (
        "Card, sm_90",
        "Measured ceilings: 600.0 TFLOP/s in bfloat16, - in int8, 3000.0 GB/s copied",
        "  torch fp8         refused: not here",
        "  qgemm against naive: FAILED, relative error 0.5, worst element - rms, NOT FINITE",
        "  qgemm against eager: out of memory",
        "  torch             refused: too large",
        "error: split4: out of memory",
    ):
        assert line in text.splitlines()
    assert "not measured" in text


def test_baselines_refuse_with_a_reason(monkeypatch):
    target, case = Target("cuda", 80, (3, 6), "Card"), Case("any", 16, 64, 8)
    with pytest.raises(baselines.Refused, match="no FP8 products on Card"):
        baselines.torch_fp8(case, target, torch.bfloat16, "cpu")
    with pytest.raises(baselines.Refused, match="more than 16 tokens"):
        baselines.torch_int8(case, target, torch.bfloat16, "cpu")
    monkeypatch.setattr(baselines, "kitchen_version", lambda: "")
    for build in baselines.KITCHEN.values():
        with pytest.raises(baselines.Refused, match="not installed"):
            build(case, target, torch.bfloat16, "cpu")


def test_columns_of_cards():
    names = lambda arch: {c.name: c for c in cases.columns(Target("cuda", arch, (3, 6)))}
    hopper, ada = names(90), names(89)
    assert hopper["operator"].grain == hopper["quantize"].grain == "channel"
    assert set(hopper) == {"qgemm", "operator", "operator + LoRA", "operator W8A8", "split4"} | QUANTIZERS
    assert ada["operator"].grain == "group"
    assert ada["operator int8"].target(Target("cuda", 89, (3, 6))).card.int4 == ""
    for shapes in cases.LAYERS.values():
        for n, k in shapes:
            parts = hopper["split4"].spec(n, k).parts
            assert len(parts) == 4
            assert all(p.width % 128 == 0 for p in parts)
            assert max(p.width for p in parts) - min(p.width for p in parts) <= 128


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


TINY_MODEL = model.Size(hidden=128, heads=2, double=1, single=1, image=12, text=5, channels=16, context=32)


def plain_flux(m, image, text, vector):
    """The model written out with plain functions, for one double and one single block."""
    full = lambda layer, x: F.linear(x, layer.weight, layer.bias)
    modulated = lambda x, scale, shift: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * (1 + scale)
        + shift
    )
    normed = lambda x, scale: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    tanh_gelu = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    tokens, heads, width = len(text) + len(image), 2, 64
    angle = torch.outer(
        torch.arange(tokens, dtype=torch.float64),
        10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2)),
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = lambda x: torch.view_as_real(
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turn
    ).flatten(-2)

    def split(block, qkv):
        q, k, v = (t.unflatten(-1, (heads, width)) for t in qkv.chunk(3, -1))
        return normed(q, block.query), normed(k, block.key), v

    def attend(q, k, v):
        weights = (torch.einsum("qhc,khc->hqk", turned(q), turned(k)) / width**0.5).softmax(-1)
        return torch.einsum("hqk,khc->qhc", weights, v.double()).flatten(1)

    act = vector * torch.sigmoid(vector)
    txt, img = full(m.text_in, text), full(m.image_in, image)
    both, pair = [], m.double_blocks[0]
    mods = {name: full(pair[name].mod, act).chunk(6, -1) for name in ("text", "image")}
    for name, x in (("text", txt), ("image", img)):
        shift, scale = mods[name][0], mods[name][1]
        both.append(split(pair[name], full(pair[name].qkv, modulated(x, scale, shift))))
    attended = attend(*(torch.cat(t) for t in zip(*both, strict=True)))
    streams = []
    for name, x, part in (("text", txt, attended[: len(text)]), ("image", img, attended[len(text) :])):
        _, _, gate, shift, scale, mlp_gate = mods[name]
        x = x + gate * full(pair[name].proj, part)
        streams.append(
            x + mlp_gate * full(pair[name].mlp2, tanh_gelu(full(pair[name].mlp0, modulated(x, scale, shift))))
        )
    x, block = torch.cat(streams), m.single_blocks[0]
    shift, scale, gate = full(block.mod, act).chunk(3, -1)
    out = full(block.linear1, modulated(x, scale, shift))
    attended = attend(*split(block, out[:, : 3 * 128]))
    x = x + gate * full(block.linear2, torch.cat((attended, tanh_gelu(out[:, 3 * 128 :])), -1))
    shift, scale = full(m.last_mod, act).chunk(2, -1)
    return full(m.last, modulated(x[len(text) :], scale, shift))


@torch.no_grad()
def test_float_model_is_the_plain_one():
    m, given = (
        model.build(TINY_MODEL, torch.float64, "cpu", None),
        model.inputs(TINY_MODEL, torch.float64, "cpu"),
    )
    for name, norm in m.named_parameters():
        if name.endswith((".query", ".key")):
            norm.copy_(torch.rand(norm.shape, dtype=norm.dtype) + 0.5)
    y = m(*given)
    assert y.shape == (12, 16)
    # The model's rotation angles are fp32.
    assert relative_error(plain_flux(m, *given), y) < 1e-6


@pytest.mark.parametrize("grain", ["group", "channel"])
def test_quantized_model_runs_and_is_small(grain):
    found = model.step(TINY_MODEL, torch.bfloat16, "cpu", grain, repeats=1)
    plain = model.step(TINY_MODEL, torch.bfloat16, "cpu", None, repeats=1)
    assert found["finite"]
    assert found["block_bytes"] < 0.6 * plain["block_bytes"]  # with rank 32 at a hidden size of 128
    m = model.build(TINY_MODEL, torch.bfloat16, "cpu", grain)
    assert m.double_blocks[0]["image"].mlp2.spec.parts[0].activation.unsigned
    assert [p.activation.unsigned for p in m.single_blocks[0].linear2.spec.parts] == [False, True]
    assert m.single_blocks[0].mod.spec.weight_only


def test_model_has_twelve_billion_weights():
    size = model.Size()
    count = lambda layers: sum(n * k for _, n, k, _ in layers) * size.hidden**2
    assert 11.8e9 < 2 * size.double * count(model.STREAM) + size.single * count(model.SINGLE) < 12e9
