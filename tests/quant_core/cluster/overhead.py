"""What Ray costs: `nibble quantize` of a FLUX-like model of random weights in one process, and on Ray with
one and with two workers, in turn. `python -m comfyui_nibble.tests.quant_core.cluster.overhead --runs 5`
prints wall and CPU seconds of each run, and ratios run by run."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from comfyui_nibble.quant_core.calibration.file import save
from comfyui_nibble.quant_core.calibration.plan import inputs_of
from comfyui_nibble.quant_core.cluster.simulate import Machine, Phase, Task, simulated
from comfyui_nibble.quant_core.evaluation import bench_fit
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.run.layers import fitting_bytes
from comfyui_nibble.tests.assets.synthetic import flux_shapes, save_random

MARK = "NIBBLE_OVERHEAD"  # an environment variable that all processes of a run have
TICK = os.sysconf("SC_CLK_TCK")
# As the command, but for the number of CPUs that Ray finds here, and that it tells when each task has ended.
COMMAND = """
import functools, sys, time
cpus = int(sys.argv.pop(1))
if cpus:
    import ray
    from comfyui_nibble.quant_core.cluster.session import Cluster
    ray.init, given = functools.partial(ray.init, num_cpus=cpus), Cluster.map
    def told(*args):
        started = time.perf_counter()
        for name in given(*args):
            print(f"\\nended {name} {time.perf_counter() - started}", file=sys.stderr)
            yield name
    Cluster.map = told
from comfyui_nibble.quant_core.cli.commands import main
main()
"""


def prepare(folder: Path, hidden: int, double: int, single: int):
    """A checkpoint and a calibration of synthetic tokens in `folder`."""
    save_random(folder / "flux.safetensors", flux_shapes(double, single, hidden, context=256, pooled=64))
    checkpoint = Checkpoint(folder / "flux.safetensors")
    layers = FLUX.layers(checkpoint.shapes)
    of = {layer.input: layer for layer in reversed(layers)}
    statistics = {i.name: bench_fit.statistics(of[i.name]) for i in inputs_of(layers)}
    meta = {"model": checkpoint.fingerprint(), "samples": 4, "done": 4, "passes": 1, "seed": 0}
    save(folder / "statistics" / "pass-000.safetensors", statistics, meta)


def timed(folder: Path, cpus: int, name: str) -> dict:
    """Wall and CPU seconds of a run, all its processes counted, and those that its layers took. cpus: workers
    on Ray; 0 without it."""
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", COMMAND, str(cpus), "quantize", str(folder / "flux.safetensors")]
    command += [str(out), "--calibration", str(folder / "statistics"), "--device", "cpu"]
    command += ["--ray", "local"] if cpus else []
    env = os.environ | {MARK: name, "OMP_NUM_THREADS": "1"}
    cpu: dict[int, int] = {}
    started = time.perf_counter()
    with open(folder / "stderr", "w+") as told:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=told)
        while process.poll() is None:
            cpu |= ticks(f"{MARK}={name}".encode())
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        said = told.seek(0) or told.read()
    if process.returncode:
        raise RuntimeError(said)
    ended = {n: float(at) for n, at in re.findall(r"^ended (\S+) (\S+)$", said, re.MULTILINE)}
    took = {row["name"]: row["seconds"] for row in PackFile(out).report}
    run = {"workers": cpus, "wall": seconds, "cpu": sum(cpu.values()) / TICK, "layers": took}
    return run | {"ended": ended}


def ticks(mark: bytes) -> dict[int, int]:
    """{process: clock ticks of CPU time so far} of all that have the mark in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes():
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                found[int(path.name)] = int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return found


def line(run: dict) -> str:
    """What a run took."""
    layers = sum(run["layers"].values())
    seconds = f"wall {run['wall']:6.1f} s  CPU {run['cpu']:6.1f} s  layers {layers:6.1f} s"
    return f"{run['workers']} workers  {seconds}"


def makespans(run: dict, checkpoint: Checkpoint) -> tuple[float, float]:
    """Seconds from the begin of the first task to the end of the last on Ray, and as `simulated` has them."""
    memory = {layer.name: fitting_bytes(layer) for layer in FLUX.layers(checkpoint.shapes)}
    begun = min(at - run["layers"][name] for name, at in run["ended"].items())
    tasks = [Task(run["layers"][name], memory[name]) for name in memory]
    found = simulated(Phase("fitting", tasks), [Machine(run["workers"])])
    return max(run["ended"].values()) - begun, found.seconds


def ratios_text(runs: list[dict]) -> str:
    """Medians of the ratios to the run in one process of the same round."""
    lines = []
    alone = [r for r in runs if not r["workers"]]
    for cpus in sorted({r["workers"] for r in runs} - {0}):
        pairs = list(zip([r for r in runs if r["workers"] == cpus], alone, strict=False))
        for what in ("wall", "cpu") if pairs else ():
            ratios = sorted(a[what] / b[what] for a, b in pairs)
            lines.append(
                f"{cpus} workers, {what}, against one process: median {median(ratios):.3f} "
                f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("runs", 3), ("hidden", 1536), ("double", 2), ("single", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), asked.hidden, asked.double, asked.single)
        for number in range(asked.runs):
            for cpus in asked.workers:
                runs.append(timed(Path(folder), cpus, f"{os.getpid()}-{number}-{cpus}"))
                print(line(runs[-1]), flush=True)
                if cpus:
                    found = makespans(runs[-1], Checkpoint(Path(folder) / "flux.safetensors"))
                    print(
                        "  tasks from begin to end: {:.1f} s, simulated {:.1f} s".format(*found), flush=True
                    )
                if asked.json:
                    asked.json.write_text(json.dumps(runs))
    print(ratios_text(runs))


if __name__ == "__main__":
    main()
