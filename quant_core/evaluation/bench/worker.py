"""The bench's child process: does one case after another, and answers each in a line of JSON.

Cases come as lines of stdin. When stdin ends, so does the process, whatever it is at: a parent that was
killed leaves none behind. All that is printed by others goes to stderr.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from .answers import DONE, FAILED, REFUSED, WRONG, Refused, Wrong

# A task: what the case gives, the results of its group, and how to say what it is at -> the result.
Task = Callable[[dict, list, Callable[..., None]], Any]
REASON = 300  # characters of an exception's text that are kept


def serve(load: Callable[[str], tuple[Mapping[str, Task], Callable[[], bool]]], device: str):
    """load(device): the tasks by name, and whether the device still takes work after an exception."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()

    def send(**message):
        out.write(json.dumps(finite(message), allow_nan=False) + "\n")
        out.flush()

    tasks, usable = load(device)
    send(ready=True)
    while True:
        asked = json.loads(lines.get())
        answer = _answer(tasks[asked["kind"]], asked, lambda **at: send(at=at))
        lost = answer["state"] == FAILED and not usable()
        send(**answer, lost=lost)


def _listen(lines):
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _answer(task: Task, asked: dict, say) -> dict:
    try:
        return {"state": DONE, "result": task(asked["given"], asked["group"], say)}
    except Refused as error:
        return {"state": REFUSED, "reason": str(error)}
    except Wrong as error:
        return {"state": WRONG, "reason": str(error), "result": error.result}
    except Exception as error:  # whatever a compiler or a driver raises: the other cases are worth having
        return {"state": FAILED, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:REASON]}"}


def finite(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
