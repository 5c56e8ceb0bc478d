"""The file of the bench's figures: one run for each machine, card, version of PyTorch, Triton and the pack,
written whole after each case."""

import json
from pathlib import Path

from ...store.atomic import save_text
from .answers import BEGUN, DIED, FAULTS, Case

FORMAT = "nibble bench 2"
TRIES = 2  # of a case that took the whole run along, as a driver that stops the machine does
# What a run's figures depend on. The commit alone would not tell a changed kernel from the one that was
# committed, so there is a hash of the sources.
IDENTITY = (
    "host", "device", "uuid", "arch", "processor", "threads", "driver", "torch", "cuda", "hip", "triton",
    "comfy_kitchen", "pack", "sources",
)  # fmt: skip


class Results:
    """The runs in a file, and the one of this machine. Raises ValueError for a file of something else."""

    def __init__(self, path: Path):
        self.path, self.runs = Path(path), []
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            fits = isinstance(found, dict) and found.get("format") == FORMAT
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{self.path}: not figures of this version of nibble bench, which would be added to it. Name "
                "another file."
            )
        self.runs = found["runs"]

    def of(self, machine: dict) -> "Run":
        """The run of a machine as it is now, made where there is none. Figures of another one stay apart."""
        identity = {name: machine.get(name) for name in IDENTITY}
        found = next((run for run in self.runs if run["identity"] == identity), None)
        if found is None:
            found = {"identity": identity, "machine": machine, "order": [], "cases": {}, "seconds": 0.0}
            self.runs.append(found)
        return Run(self, found)

    def save(self):
        text = json.dumps({"format": FORMAT, "runs": self.runs}, indent=1, allow_nan=False)
        save_text(self.path, text + "\n")


class Run:
    """One run's cases by id: {"kind", "given", "state", "result" or "reason", "at", "seconds"}."""

    def __init__(self, results: Results, held: dict):
        self.results, self.held = results, held
        self.cases: dict[str, dict] = held["cases"]

    def plan(self, cases: list[Case], **facts):
        """Takes the order of the plan; answers to cases that are in no plan any more stay."""
        self.held |= facts
        self.held["order"] = [case.id for case in cases]

    def known(self, case: Case) -> dict | None:
        """The answer of an earlier run, None where the case is still to be done."""
        entry = self.cases.get(case.id)
        if entry is None or entry["state"] != BEGUN:
            return entry
        if entry["tries"] < TRIES:
            return None
        reason = f"the whole run ended at this case, {TRIES} times"
        self.cases[case.id] = entry | {"state": DIED, "reason": reason}
        return self.cases[case.id]

    def begin(self, case: Case):
        tries = self.cases.get(case.id, {}).get("tries", 0) + 1
        asked = {"kind": case.kind, "given": case.given, "group": case.group}
        self.cases[case.id] = asked | {"state": BEGUN, "tries": tries}
        self.results.save()

    def forget(self, case: Case):
        """The case was stopped by who asked for it, and is none the worse for that."""
        self.cases.pop(case.id, None)
        self.results.save()

    def answer(self, case: Case, answer: dict, seconds: float):
        asked = {"kind": case.kind, "given": case.given, "group": case.group}
        self.cases[case.id] = asked | answer | {"seconds": round(seconds, 2)}
        self.held["seconds"] = round(self.held["seconds"] + seconds, 1)
        self.results.save()

    def group(self, name: str) -> list[dict]:
        """Results of a group that are done."""
        found = self.cases.values() if name else ()
        return [c["result"] for c in found if c.get("group") == name and c["state"] == "done"]

    @property
    def faults(self) -> dict[str, dict]:
        return {name: entry for name, entry in self.cases.items() if entry["state"] in FAULTS}
