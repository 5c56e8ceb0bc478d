"""Made-up tasks for the bench's child, which imports no torch for them."""

import json
import os
import sys
import time

from comfyui_nibble.quant_core.evaluation.bench.answers import Case, Refused, Wrong
from comfyui_nibble.quant_core.evaluation.bench.child import Child

NAMES = [f"case {i}" for i in range(8)]
MACHINE = {"host": "here", "device": "card", "torch": "2", "backend": "cpu", "arch": "", "threads": 1}
MACHINE |= dict.fromkeys(("driver", "triton", "cuda", "comfy_kitchen", "commit", "processor"), "")


def tasks(device):
    """What `worker.serve` is given: cases that answer, hang, die, are wrong, do not exist or raise."""

    def machine(given, group, say):
        facts = MACHINE | json.loads(os.environ.get("MADE_UP", "{}"))
        limit = float(os.environ.get("LIMIT", "60"))
        kinds = json.loads(os.environ.get("KINDS", "{}"))
        made = [Case(n, kinds.get(n, "right"), {"name": n}, 0.0, limit, group="all").to_json() for n in NAMES]
        return {"machine": facts, "cases": made}

    def right(given, group, say):
        say(what="computing", tile={"bm": 64})
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return {"ms": 1.0, "name": given["name"], "process": os.getpid(), "group": len(group)}

    def hangs(given, group, say):
        say(what="waiting", tile={"bm": 128})
        time.sleep(1000)

    def dies(given, group, say):
        say(what="falling", tile={"bm": 256})
        print("no such address", file=sys.stderr, flush=True)
        os._exit(3)

    def wrong(given, group, say):
        say(what="comparing", tile={"bm": 32})
        raise Wrong("relative error 0.5", {"error": 0.5})

    def refused(given, group, say):
        raise Refused("no such product here")

    def raises(given, group, say):
        raise RuntimeError("the device\nis lost")

    made = (machine, right, hangs, dies, wrong, refused, raises)
    return {task.__name__: task for task in made}, lambda: False


CHILD = """
from comfyui_nibble.quant_core.evaluation.bench.worker import serve
from comfyui_nibble.tests.quant_core.evaluation.bench.made_up import tasks
serve(tasks, "")
"""


def child():
    return Child([sys.executable, "-c", CHILD])
