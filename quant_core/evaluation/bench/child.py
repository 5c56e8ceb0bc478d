"""The bench's child as its parent sees it: asked for a case, it answers in time or is ended."""

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import IO

from .answers import CUT, DIED, HANGS, Case

START_S = 180.0  # until a process has imported PyTorch and opened the device, from a cold disk
END_S = 10.0  # that a killed process is waited for; one that a driver holds is left behind
_MAIN = """
import sys
from {package}.tasks import load
from {package}.worker import serve
serve(load, sys.argv[1])
"""


def command(device: str) -> list[str]:
    """What the parent runs."""
    return [sys.executable, "-P", "-c", _MAIN.format(package=__package__), device]


class Child:
    """At most one process at a time, made when it is needed. clock: seconds that only grow."""

    def __init__(self, command: Sequence[str], clock: Callable[[], float] = time.perf_counter):
        self.command, self.clock = list(command), clock
        self.process: subprocess.Popen | None = None
        self.errors: IO[bytes] = io.BytesIO()  # of the process: its stderr, in a file without a name
        self.interpret = False

    def ask(self, case: Case, group: list, end: float = float("inf")) -> dict:
        """The answer: `state`, `result` or `reason`, and `at`, what the process said last that it was at.

        After case.limit_s of silence it is ended, and the state is HANGS; after `end`, CUT.
        """
        if self.process is not None and (case.fresh or case.interpret != self.interpret):
            self.close()
        at: dict = {}
        if self.process is None:
            self._start(case.interpret)
            answer = self._next(START_S, end, at)
            if "ready" not in answer:
                return answer | {"at": {"what": "starting"}}
        self._send({"id": case.id, "kind": case.kind, "given": case.given, "group": group})
        while True:
            answer = self._next(case.limit_s, end, at)
            if "at" not in answer or "state" in answer:
                break
            at = answer["at"]
        if answer.pop("lost", False) or case.fresh:
            self.close()
        return answer | ({"at": at} if at else {})

    def _start(self, interpret: bool):
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.interpret = interpret
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=env | ({"TRITON_INTERPRET": "1"} if interpret else {}),
            text=True,
            encoding="utf-8",
        )
        self.lines: SimpleQueue[str | None] = SimpleQueue()
        threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True).start()

    @staticmethod
    def _read(stream, lines):
        for line in stream:
            lines.put(line)
        lines.put(None)

    def _send(self, message: dict):
        assert self.process is not None
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(OSError):  # it has ended: what comes next says so
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()

    def _next(self, limit_s: float, end: float, at: dict) -> dict:
        wait = min(limit_s, end - self.clock())
        try:
            line = self.lines.get(timeout=max(wait, 0.0))
        except Empty:
            self.close()
            if self.clock() >= end:
                return {"state": CUT, "reason": "the time for all was over"}
            return {"state": HANGS, "reason": f"no answer in {limit_s:.0f} s", "at": at}
        if line is not None:
            return json.loads(line)
        said, code = self._last_words(), self.close(END_S)
        return {"state": DIED, "reason": f"the process ended, exit code {code}{said}", "at": at}

    def _last_words(self) -> str:
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 4096))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""

    def close(self, patience_s: float = 0.0) -> int | None:
        """Ends the process, after `patience_s` by force; its exit code, None where it could not be ended."""
        process, self.process = self.process, None
        if process is None:
            return None
        code = _waited(process, patience_s)
        if code is None:
            process.kill()
            code = _waited(process, END_S)
        for stream in (process.stdin, process.stdout, self.errors):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        return code


def _waited(process, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
