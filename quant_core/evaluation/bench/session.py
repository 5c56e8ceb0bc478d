"""One run of the bench: its document, filled case by case and saved after each."""

import json
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ....kernels.target import Target, interpreter, target_of
from ...store.atomic import save_text
from . import baselines, cases, machine, model, ours, plot, report, timing, verify
from .cases import Case, Column


class DeviceLost(RuntimeError):
    """The device takes no more work after an error; what was measured before stands."""


SEEDS = (
    "CRC-32 of a case's name; its in-channels for the comparison with naive; 0 and 1 for the model, its input"
)


class Session:
    """Raises ValueError where Triton cannot be used."""

    def __init__(self, device: torch.device, path: Path, command: str, echo):
        self.started, self.path, self.echo = time.perf_counter(), path, echo
        self.gpu = device.type != "cpu"
        if self.gpu:
            torch.cuda.set_device(device.index or 0)
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.target: Target = target_of(device) if self.gpu else interpreter()
        if self.target.triton is None:
            raise ValueError(f"the kernels need Triton: {self.target.trouble or 'it is not installed'}")
        self.dtype = self.target.matrix_dtype
        self.columns = cases.columns(self.target)
        self.compared: dict[tuple, verify.Check | None] = {}
        self.doc: dict[str, Any] = {
            "machine": machine.describe(device, self.target),
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seeds": SEEDS,
            "dtype": str(self.dtype).removeprefix("torch."),
            "timed": self.gpu,
            "ceilings": {},
            "rows": [],
            "model": {},
            "tuned": [],
            "targets": [],
            "errors": [],
            "seconds": 0.0,
        }

    def say(self, text: str):
        self.echo(f"[{time.perf_counter() - self.started:6.1f} s] {text}")

    def save(self) -> dict:
        """Writes the JSON and the text; returns what was written."""
        self.doc["seconds"] = round(time.perf_counter() - self.started, 1)
        self.doc["targets"] = report.targets(self.doc["rows"], self.doc["ceilings"], self.target.arch)
        plain = _finite(self.doc)
        save_text(self.path, json.dumps(plain, indent=1, allow_nan=False) + "\n")
        save_text(self.path.with_suffix(".txt"), report.benchmark_text(plain))
        return plain

    def finish(self) -> int:
        """Writes everything, prints the report; the exit code."""
        plain = self.save()
        plot.draw(plain, self.path.with_suffix(".png"))
        self.echo(report.benchmark_text(plain))
        self.say(f"{self.path}, .txt and .png")
        return 1 if plain["errors"] or any(row["failed"] for row in plain["rows"]) else 0

    def attempt(self, call: Callable[[], Any]) -> tuple[Any, str]:
        """(result, "") or (None, reason). Raises DeviceLost where the device is of no more use."""
        try:
            return call(), ""
        except baselines.Refused as e:
            return None, str(e)
        except Exception as e:  # whatever a column raises goes into its cell: the others are worth having
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        if self.gpu:
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as e:
                raise DeviceLost(reason) from e
            torch.cuda.empty_cache()
        return None, reason

    def compare(self, chosen):
        """Comparisons only."""
        for case in chosen:
            row = self.new_row(case)
            self.check(row, case)
            self.row_done(row)

    def everything(self, chosen, tune: bool, with_model: bool):
        """Ours and PyTorch's first, then the model, comfy-kitchen last: foreign native code that fails may
        take the device along."""
        try:
            for name, ceiling in timing.ceilings(self.device, self.dtype).items():
                self.doc["ceilings"][name], reason = self.attempt(ceiling)
                self.say(f"{name}: {reason or format(self.doc['ceilings'][name], '.4g')}")
            for case in chosen:
                self.case(case, tune)
            if with_model:
                self.model_rows()
            for row in self.doc["rows"]:
                if not row["failed"]:
                    self.fill_baselines(row, baselines.KITCHEN)
                    self.row_done(row)
        except DeviceLost as e:
            self.doc["errors"].append(f"stopped, the device is lost: {e}")
            self.say(self.doc["errors"][-1])

    def new_row(self, case: Case) -> dict:
        least = report.least_ms(case.flops, case.least_bytes, self.doc["ceilings"])
        row = vars(case) | {"name": case.name, "least_ms": least, "failed": False, "checks": {}, "cells": {}}
        self.doc["rows"].append(row)
        return row

    def row_done(self, row: dict):
        """A line of progress, and all that there is so far into the files."""
        wrong = [
            c["error"] for found in row["checks"].values() for c in found.values() if not c.get("ok", True)
        ]
        fast = [
            f"{name} {c['speedup']:.2f} x"
            for name, c in row["cells"].items()
            if c.get("speedup") and name != "torch"
        ]
        self.say(
            f"{row['name']}: "
            + (f"WRONG OUTPUT, relative error {max(wrong):.3g}" if wrong else ", ".join(fast) or "compared")
        )
        self.save()

    def case(self, case: Case, tune: bool):
        row = self.new_row(case)
        torch.cuda.empty_cache()
        if tune:
            self.tune(case)
        self.check(row, case)
        if not row["failed"]:
            self.fill_baselines(row, baselines.TORCH)
            for column in self.runnable(row):
                make = lambda column=column: ours.work_of(
                    column, *ours.layer_of(case, column, self.dtype, self.device), self.target
                )
                self.fill(
                    row, column.name, make, None if column.kind == "quantize" else case.flops, is_ours=True
                )
        self.row_done(row)

    def runnable(self, row: dict) -> list[Column]:
        """Our columns that have met no obstacle yet."""
        return [c for c in self.columns if c.name not in row["cells"]]

    def tune(self, case: Case):
        from .tune import problem_of, tune, tuned_columns

        for column in tuned_columns(self.columns):
            if ours.refusal(column, case.n, case.k, self.target):
                continue
            key = problem_of(case, column, self.target).key
            if all(found["key"] != key for found in self.doc["tuned"]):
                found, reason = self.attempt(
                    partial(tune, case, column, self.target, self.dtype, self.device)
                )
                self.doc["tuned"].append(found or {"key": key, "error": reason})
                self.say(f"tuned {key}: {found['best'] if found else reason}")

    def check(self, row: dict, case: Case):
        """Both comparisons of all columns. Cases that differ beyond the cut layer share the one with
        naive."""
        for column in self.columns:
            reason = ours.refusal(column, case.n, case.k, self.target)
            if reason:
                row["cells"][column.name] = report.refused(reason)
                continue
            key = (column.spec(min(case.n, verify.CHANNELS), case.k), column.int8, min(case.m, verify.ROWS))
            call = lambda column=column: verify.against_naive(
                case, column, self.target, self.dtype, self.device
            )
            self.compared[key] = self.keep(
                row, column, "naive", lambda key=key, call=call: self.compared.get(key) or call()
            )
        for column in self.runnable(row):
            if column.kind != "quantize" and not row["failed"]:
                self.keep(row, column, "eager", lambda column=column: self.against_eager(case, column))

    def against_eager(self, case: Case, column: Column) -> verify.Check:
        layer = ours.layer_of(case, column, self.dtype, self.device)
        work = ours.work_of(column, *layer, self.target)
        return verify.against_eager(work.call(*work.operands), *layer)

    def keep(self, row: dict, column: Column, against: str, call) -> verify.Check | None:
        """A wrong output fails the case; an exception takes the column out of it, and is an error of the
        run."""
        check, reason = self.attempt(call)
        row["checks"].setdefault(column.name, {})[against] = (
            check.to_json() if check else report.refused(reason)
        )
        if check is None:
            row["cells"][column.name] = report.refused(reason)
            self.doc["errors"].append(f"{row['name']}, {column.name}: {reason}")
        elif not check.ok:
            row["failed"] = True
        return check

    def fill_baselines(self, row: dict, builders: dict):
        case = Case(row["model"], row["n"], row["k"], row["m"])
        for name, build in builders.items():
            self.fill(
                row, name, lambda build=build: build(case, self.target, self.dtype, self.device), case.flops
            )

    def fill(self, row: dict, name: str, make, flops, is_ours: bool = False):
        """Builds and times one cell."""
        work, reason = self.attempt(make)
        taken: Any = None
        if not reason:
            taken, reason = self.attempt(lambda: timing.measure(work, self.device))
        if reason:
            row["cells"][name] = report.refused(reason)
            self.doc["errors"] += [f"{row['name']}, {name}: {reason}"] * is_ours
            return
        base = taken.ms if name == "torch" else row["cells"].get("torch", {}).get("ms")
        row["cells"][name] = report.cell(taken, flops, base, work.note)

    def model_rows(self):
        first, other = cases.primary_grain(self.target), cases.other_grain(self.target)
        for name, grain in {"torch": None, "operator": first, f"operator {other}": other}.items():
            found, reason = self.attempt(
                lambda grain=grain: model.step(model.Size(), self.dtype, self.device, grain)
            )
            self.doc["model"][name] = found or report.refused(reason)
            self.say(f"model, {name}: {reason or format(found['ms'], '.1f') + ' ms'}")
            if grain and (reason or not found["finite"]):
                self.doc["errors"].append(f"model, {name}: {reason or 'the output is not finite'}")
            self.save()


def _finite(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
