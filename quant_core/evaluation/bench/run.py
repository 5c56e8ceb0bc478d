"""`nibble bench`: every case in a child process, with a time limit, saved when it is answered."""

import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from ...store.atomic import require_writable, save_text
from ...store.lock import only_run
from .answers import CUT, DONE, FAULTS, REFUSED, Case
from .child import Child, command
from .results import Results, Run

MINUTES = 9.0


def run(
    device: str = "auto",
    json_path: str | Path = "bench.json",
    everything: bool = False,
    minutes: float = MINUTES,
    echo: Callable[[str], None] = print,
    child: Child | None = None,
    said: str = "",
) -> int:
    """Writes json_path and, beside it, .txt and .png. Returns the exit code: 1 where an output is wrong or a
    case ended without an answer.

    A file of an earlier run is gone on with. everything: layers beside comfy-kitchen, fits, calibration and
    tuning, too. minutes: begin nothing that would take longer. said: the command, for the report. Raises
    ValueError where the device cannot be used.
    """
    path = Path(json_path)
    for out in outputs_of(path):
        require_writable(out)
    started = time.perf_counter()
    say = lambda text: echo(f"[{time.perf_counter() - started:6.1f} s] {text}")
    child = child or Child(command(device))
    with only_run(path, f"measures into {path.name}"):
        try:
            results = Results(path)
            mine, cases = _begin(child, results, everything)
            mine.plan(
                cases,
                command=said or shlex.join(sys.argv),
                date=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            _say_kept(mine, cases, len(results.runs) - 1, say)
            _all(child, mine, cases, started + 60 * minutes, say)
        finally:
            child.close()
        results.save()
    return _report(mine, path, echo)


def _begin(child: Child, results: Results, everything: bool) -> tuple[Run, list[Case]]:
    """Asks the child what machine this is and what there is to measure on it."""
    answer = child.ask(Case("machine", "machine", {"everything": everything}, limit_s=120), [])
    if answer["state"] != DONE:
        raise ValueError(answer["reason"])
    found = answer["result"]
    return results.of(found["machine"]), [Case(**case) for case in found["cases"]]


def _say_kept(mine: Run, cases: list[Case], others: int, say):
    """What an earlier run has left: figures, and cases that are not tried again."""
    kept = [entry for case in cases if (entry := mine.known(case)) is not None]
    if kept:
        say(f"kept from an earlier run: {len(kept)} of {len(cases)} cases")
    for name, entry in mine.faults.items():
        say(f"not tried again: {name}: {_fault(entry)}")
    if others:
        say(f"{others} other runs in the file are of another machine, card or version, and stay as they are")


def _fault(entry: dict) -> str:
    """E.g. "hangs, no answer in 60 s, at {...}"."""
    at = f", at {entry['at']}" if entry.get("at") else ""
    return f"{entry['state']}, {entry['reason']}{at}"


def _all(child: Child, mine: Run, cases: list[Case], end: float, say):
    left = 0
    for case in cases:
        if mine.known(case) is not None:
            continue
        if (reason := _missing(mine, case)) is not None:
            mine.answer(case, {"state": REFUSED, "reason": reason}, 0.0)
        elif child.clock() + case.seconds > end or not _one(child, mine, case, end, say):
            left += 1
    if left:
        say(f"the time is over: {left} of {len(cases)} cases are left for the next run with this file")


def _missing(mine: Run, case: Case) -> str | None:
    """Why a case makes no sense, None where it does. One whose need was not reached is done all the same: it
    has been put where it has none."""
    needed = mine.cases.get(case.needs)
    return None if needed is None or needed["state"] == DONE else f"{case.needs}: {needed.get('reason')}"


def _one(child: Child, mine: Run, case: Case, end: float, say) -> bool:
    """Whether the case was answered before the end."""
    mine.begin(case)
    started = child.clock()
    try:
        answer = child.ask(case, mine.group(case.group), end)
    except BaseException:  # an interrupt: the case is none the worse for it
        mine.forget(case)
        raise
    if answer["state"] == CUT:
        mine.forget(case)
        return False
    mine.answer(case, answer, child.clock() - started)
    bad = answer["state"] in FAULTS
    say(f"{case.id}: " + (_fault(answer) if bad else answer.get("reason") or _brief(answer["result"])))
    return True


def _brief(result) -> str:
    ms = result.get("ms") if isinstance(result, dict) else None
    return DONE if ms is None else f"{ms:.4g} ms"


def _report(mine: Run, path: Path, echo) -> int:
    from . import plot, report
    from .document import document
    from .sections import NOT_OURS

    found = document(mine.held)
    text = report.benchmark_text(found)
    save_text(path.with_suffix(".txt"), text)
    if found["rows"]:
        plot.draw(found, path.with_suffix(".png"))
    echo(text)
    echo(f"{path}, .txt and .png")
    return 1 if any(entry["kind"] not in NOT_OURS for entry in mine.faults.values()) else 0


def outputs_of(path: Path) -> tuple[Path, Path, Path]:
    """The figures, the table and the plot. Raises ValueError where one would be written over another."""
    made = path, path.with_suffix(".txt"), path.with_suffix(".png")
    if len(set(made)) < len(made):
        raise ValueError(
            f"{path}: the table (.txt) and the plot (.png) beside the figures would take their place. "
            f"Name another file, such as {path.with_suffix('.json')}."
        )
    return made
