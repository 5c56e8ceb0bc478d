"""Commands in processes of their own, started from one that has imported everything: milliseconds each, so
that many can be killed."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open

PRELOAD = [
    "torch",
    "comfyui_nibble.quant_core.cli.quantize",
    "comfyui_nibble.quant_core.convert.convert",
    "comfyui_nibble.tests.reliability.small",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), and all that it printed."""

    code: int
    text: str


def size_of(option: str, small: int) -> int:
    """How many cases to run: the environment variable `option`, or `small`, which CI runs."""
    return int(os.environ.get(option, small))


def context():
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOAD)
    return made


class Run:
    """`nibble` with arguments, or a function of tests.reliability.small by its name, under way."""

    def __init__(self, arguments: list, log: Path, **options):
        self.log = Path(log)
        self.process = context().Process(
            target=_main, args=([str(a) for a in arguments], str(self.log)), kwargs=options
        )
        self.process.start()

    def wait(self, seconds: float | None = None) -> Ended | None:
        """None where it is still going after `seconds`."""
        self.process.join(seconds)
        return None if self.process.exitcode is None else Ended(self.process.exitcode, self.log.read_text())

    def kill(self, number: int = signal.SIGKILL) -> Ended:
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.wait()


def run(arguments: list, log: Path, **options) -> Ended:
    """The same to its end. largest: bytes that its files may have; without_check: the room is not looked at
    before the work; stop_after: pieces of work after which it is interrupted."""
    return Run(arguments, log, **options).wait(600)


def small_inputs(folder: Path):
    """Writes what commands of these tests read: native.safetensors, quantized from the shipped model, and the
    calibrations a and b."""
    from comfyui_nibble.quant_core.evaluation.demo import tiny_flux

    made = folder / "native.safetensors"
    asked = ["quantize", tiny_flux.CHECKPOINT, made, "--method", "native", "--device", "cpu"]
    for arguments in (asked, ["calibration", folder / "a"], ["calibration", folder / "b"]):
        assert run(arguments, folder / "log").code == 0


def _main(arguments, log, largest=None, without_check=False, stop_after=None):
    from comfyui_nibble.quant_core.cli import commands, quantize
    from comfyui_nibble.quant_core.run import stages
    from comfyui_nibble.quant_core.store import atomic
    from comfyui_nibble.tests.reliability import small

    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(
        signal.SIGINT, lambda *_: os._exit(130)
    )  # until the command has its own: Python says where it was
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if without_check:
        atomic.require_room = quantize.require_room = lambda *_: None
    if stop_after is not None:
        stages.Unfinished.save = _stopping(stages.Unfinished.save, stop_after)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if hasattr(small, arguments[0]):
        commands.app = lambda: getattr(small, arguments[0])(
            *arguments[1:]
        )  # with the command's handling of signals and errors
    sys.argv = ["nibble", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commands.main()


def _stopping(save, after):
    done = count(1)

    def saved(*args):
        save(*args)
        if next(done) == after:
            raise KeyboardInterrupt

    return saved


def moments(number: int, seconds: float, seed: int) -> list[float]:
    """Random moments of a run that takes `seconds` undisturbed."""
    draw = random.Random(seed)
    return [draw.uniform(0, seconds) for _ in range(number)]


def contents(folder: Path) -> dict:
    """{name: what is in it} of all files below, but for what runs of the same work differ in: how long each
    layer took, and when."""
    return {str(p.relative_to(folder)): _what(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _what(path):
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        metadata = {
            k: json.loads(v) if v[:1] == "{" else v
            for k, v in (f.metadata() or {}).items()
            if k != "nibble_xxh3"
        }
    for row in metadata.get("nibble", {}).get("report", ()):
        row.pop("seconds", None)
    return metadata, {
        k: (t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for k, t in tensors.items()
    }
