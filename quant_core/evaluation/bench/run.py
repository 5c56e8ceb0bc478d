"""`nibble bench`: checks and times the kernels on this machine."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from ...store.atomic import require_writable
from . import cases
from .cases import Case

_AGAIN = "import json, sys; from {module} import run; sys.exit(run(**json.loads(sys.argv[1])))"


def run(
    device="auto",
    json_path="bench.json",
    quick=False,
    tune=False,
    with_model=None,
    command=None,
    only=None,
    echo=None,
) -> int:
    """Writes json_path and, beside it, .txt and .png. Returns the exit code: 1 where an output is wrong or a
    kernel of ours failed.

    with_model: the model row; None: unless `quick`. only: cases in place of the lists of `cases`. On a CPU
    the kernels run in Triton's interpreter, in a process of its own where this one was not started for it,
    and nothing is timed. Raises ValueError where the device cannot do what is asked.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for path in outputs_of(Path(json_path)):
        require_writable(path)
    command = command or shlex.join(sys.argv)
    chosen = [c if isinstance(c, Case) else Case(**c) for c in only] if only else None
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and (tune or with_model):
        raise ValueError("there is no GPU to time anything on: without one, leave out --tune and --model")
    if not on_cpu and not torch.cuda.is_available():
        raise ValueError(f"{device}: PyTorch finds no GPU")
    if not on_cpu and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(
            "TRITON_INTERPRET=1 is set: on a GPU the kernels would run in Triton's interpreter; unset it"
        )
    if on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        given = {
            "device": device,
            "json_path": str(json_path),
            "command": command,
            "only": None if chosen is None else [vars(c) for c in chosen],
        }
        again = [sys.executable, "-P", "-c", _AGAIN.format(module=__name__), json.dumps(given)]
        return subprocess.run(again, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode

    from .session import Session

    session = Session(torch.device(device), Path(json_path), command, echo or _print)
    if on_cpu:
        session.compare(chosen or cases.TINY)
    else:
        session.everything(
            chosen or (cases.QUICK if quick else cases.FULL),
            tune,
            not quick if with_model is None else with_model,
        )
    return session.finish()


def outputs_of(path: Path) -> tuple[Path, Path, Path]:
    """The figures, the table and the plot. Raises ValueError where one would be written over another."""
    made = path, path.with_suffix(".txt"), path.with_suffix(".png")
    if len(set(made)) < len(made):
        raise ValueError(
            f"{path}: the table (.txt) and the plot (.png) beside the figures would take their place. "
            f"Name another file, such as {path.with_suffix('.json')}."
        )
    return made


def _print(text):
    print(text, flush=True)
