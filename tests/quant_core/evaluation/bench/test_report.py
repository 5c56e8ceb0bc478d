"""What a bench's results say: targets, numbers, refusals."""

import pytest
import torch

from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.evaluation.bench import (
    baselines,
    cases,
    report,
    timing,
)
from comfyui_nibble.quant_core.evaluation.bench.cases import Case


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
        "sensors": "",
        "power_limit_w": 700.0,
    }
    doc = {
        "machine": facts | {"torch": "2", "triton": "3"},
        "date": "today",
        "command": "nibble bench",
        "dtype": "bfloat16",
        "timed": True,
    }
    fault = {"state": "hangs", "reason": "no answer in 60 s", "at": {"tile": {"bm": 64}}}
    step = lambda grain, ms, **more: {
        "state": "done",
        "given": {"grain": grain, "size": {"batch": 1}},
        "result": {"ms": ms, "peak_bytes": 2**30, "block_bytes": 2**29, "paths": {}, "finite": True} | more,
    }
    sensors = {
        "sm_mhz": [1200, 1500, 1800],
        "power_w": [90.0, 400.0, 690.0],
        "celsius": "not known: no sensor",
    }
    doc |= {
        "ceilings": {"bf16_flops": 6e14, "int8_flops": None, "bytes_per_s": 3e12},
        "rows": [row],
        "faults": {"check a: split4": fault},
        "left": 3,
        "model": {
            "model torch, A": step(None, 200.0),
            "model group, A": step("group", 100.0, paths={"int4": 300}, sensors=sensors),
            "model torch, B": {
                "state": "refused",
                "reason": "too large",
                "given": {"grain": None, "size": {}},
            },
        },
        "targets": report.targets([row], {}, 90),
    }
    doc |= {"host": {}, "cpu": {}, "fits": {}, "tuned": {}}
    text = report.benchmark_text(doc)
    for line in (
        "Card, sm_90",
        "Measured ceilings: 600.0 TFLOP/s in bfloat16, - in int8, 3000.0 GB/s copied",
        "  torch fp8         refused: not here",
        "  qgemm against naive: FAILED, relative error 0.5, worst element - rms, NOT FINITE",
        "  qgemm against eager: out of memory",
        "  model torch, B refused: too large",
        "  model group, A     100.0 ms   2.00 x  peak 1.00 GiB, blocks 0.50 GiB; 300 int4",
        "while timing: 1200 to 1800 MHz, 90 to 690 W; limit 700 W",
        "  check a: split4: hangs, no answer in 60 s, at {'tile': {'bm': 64}}",
        "3 cases are left for the next run with this file",
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
    quantizers = {"quantize", "quantize token", "quantize transform"}
    assert set(hopper) == {"qgemm", "operator", "operator + LoRA", "operator W8A8", "split4"} | quantizers
    assert ada["operator"].grain == "group"
    assert ada["operator int8"].target(Target("cuda", 89, (3, 6))).card.int4 == ""
    for shapes in cases.LAYERS.values():
        for n, k in shapes:
            parts = hopper["split4"].spec(n, k).parts
            assert len(parts) == 4
            assert all(p.width % 128 == 0 for p in parts)
            assert max(p.width for p in parts) - min(p.width for p in parts) <= 128
