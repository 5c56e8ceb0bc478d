"""From the answers of a run to the document that is printed and drawn."""

from typing import Any

from ....kernels.target import Target
from . import report
from .answers import BEGUN, DONE, FAULTS, WRONG
from .cases import Case, columns
from .timing import Timing

_TIMING = tuple(Timing.__dataclass_fields__)


def document(run: dict) -> dict[str, Any]:
    """run: one of `results.Results.runs`. Cases of its plan in that order, those of earlier plans behind."""
    machine, answers = run["machine"], run["cases"]
    order = [name for name in run["order"] if name in answers]
    order += [name for name in answers if name not in set(order)]
    found = {name: answers[name] for name in order if answers[name]["state"] != BEGUN}
    of = lambda kind: {name: entry for name, entry in found.items() if entry["kind"] == kind}
    ceilings = {e["given"]["name"]: _result(e).get("value") for e in of("ceiling").values()}
    rows = _rows(found, ceilings)
    return {
        "machine": machine,
        "command": run["command"],
        "date": run["date"],
        "dtype": machine.get("dtype", ""),
        "timed": machine["backend"] != "cpu",
        "left": len(run["order"]) - len([name for name in run["order"] if name in found]),
        "ceilings": ceilings,
        "rows": rows,
        "model": of("model"),
        "host": of("host"),
        "cpu": of("cpu"),
        "fits": of("fit") | of("calibration"),
        "tuned": of("tune"),
        "targets": report.targets(rows, ceilings, machine["arch"]),
        "faults": {name: entry for name, entry in found.items() if entry["state"] in FAULTS},
        "seconds": run["seconds"],
    }


def _result(entry: dict) -> dict:
    return entry["result"] if entry["state"] == DONE else {}


def _rows(found: dict[str, dict], ceilings: dict) -> list[dict]:
    """One a layer and number of tokens, with its comparisons and times."""
    rows: dict[str, dict] = {}
    for entry in found.values():
        if entry["kind"] not in ("check", "time", "baseline"):
            continue
        case = Case(**entry["given"]["layer"])
        least = report.least_ms(case.flops, case.least_bytes, ceilings)
        new = vars(case) | {"name": case.name, "least_ms": least, "failed": False, "checks": {}, "cells": {}}
        row = rows.setdefault(case.name, new)
        name = entry["given"].get("column") or entry["given"]["name"]
        if entry["kind"] == "check":
            _checked(row, name, entry)
        else:
            row["cells"][name] = entry
    for row in rows.values():
        row["cells"] = _cells(row)
    return list(rows.values())


def _checked(row: dict, name: str, entry: dict):
    row["failed"] = row["failed"] or entry["state"] == WRONG
    if entry["state"] in (DONE, WRONG):
        row["checks"][name] = entry["result"]
    else:
        row["checks"][name] = {"both": report.refused(entry["reason"])}


def _cells(row: dict) -> dict[str, dict]:
    """Numbers with rates and ratios to PyTorch's 16-bit linear, or the reason why there is none."""
    case, entries = Case(row["model"], row["n"], row["k"], row["m"]), row["cells"]
    base = _result(entries["torch"]).get("ms") if "torch" in entries else None
    quantizers = {c.name for c in columns(Target("cuda", 89)) if c.kind == "quantize"}
    out = {}
    for name, entry in entries.items():
        result = _result(entry)
        if not result:
            out[name] = report.refused(entry["reason"])
            continue
        timing = Timing(**{field: result[field] for field in _TIMING})
        flops = None if name in quantizers else case.flops
        out[name] = report.cell(timing, flops, base, result["note"]) | {"sensors": result["sensors"]}
    return out
