"""What the bench's child does: one task a kind of case, on the device that it holds."""

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any

import torch

from ....kernels.plan import lower
from ....kernels.target import Target, interpreter, target_of
from ....kernels.tuning import Tile, gemm_tile
from . import baselines, cases, cpu, fits, host_cost, machine, model, ours, timing, verify
from .answers import Refused, Wrong
from .plan import Sizes, planned
from .sensors import Sensors
from .tune import Candidates, problem_of


def load(device: str):
    """For `worker.serve`."""
    tasks = Tasks(device)
    return tasks.table, tasks.usable


def _in_memory(task):
    """What does not fit is refused, and says so: on a small card that is no fault."""

    @wraps(task)
    def run(given, group, say):
        try:
            return task(given, group, say)
        except torch.cuda.OutOfMemoryError as error:
            model.free()
            raise Refused(f"out of memory: {str(error).splitlines()[0][:200]}") from error

    return run


class Tasks:
    """Raises ValueError where the device is not there. sizes: what `machine` plans."""

    def __init__(self, device: str, sizes: Sizes | None = None):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = torch.device("cpu" if interpreted else device)
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"{device}: PyTorch finds no GPU")
            torch.cuda.set_device(chosen.index or 0)
            chosen = torch.device("cuda", torch.cuda.current_device())
        self.device, self.sizes = chosen, sizes or Sizes()
        self.target: Target = interpreter() if interpreted else target_of(chosen)
        self.dtype = self.target.matrix_dtype
        self.columns = {column.name: column for column in cases.columns(self.target)}
        self.sensors = Sensors(chosen)
        self.held: tuple[Any, model.Flux | None] = (None, None)
        self.tuned: tuple[Any, Candidates | None] = (None, None)
        self.compared: dict[tuple, verify.Check] = {}
        kinds: list[Callable] = [self.machine, self.ceiling, self.check, self.time, self.baseline, self.model]
        kinds += [self.tune, self.host, self.cpu, self.fit, self.calibration]
        self.table = {kind.__name__: _in_memory(kind) for kind in kinds}

    def usable(self) -> bool:
        """Whether the device takes work after an exception."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def machine(self, given, group, say) -> dict:
        """What this is, and what there is to measure."""
        if self.device.type == "cuda" and self.target.triton is None:
            raise Refused(f"the kernels need Triton: {self.target.trouble or 'it is not installed'}")
        found = machine.describe(self.device, self.target, self.sensors)
        found["dtype"] = str(self.dtype).removeprefix("torch.")
        plan = planned(self.target, found.get("memory_bytes", 0), given["everything"], self.sizes)
        return {"machine": found, "cases": [case.to_json() for case in plan]}

    def ceiling(self, given, group, say) -> dict:
        with self.sensors.reading() as sensors:
            value = timing.ceilings(self.device, self.dtype)[given["name"]]()
        return {"value": value, "sensors": sensors}

    def check(self, given, group, say) -> dict:
        """Both comparisons of a column; layers that differ beyond the cut one share the one with naive."""
        case, column = self._layer(given)
        if reason := ours.refusal(column, case.n, case.k, self.target):
            raise Refused(reason)
        say(what="against naive", tile=self._tile(case, column))
        key = (column.spec(min(case.n, verify.CHANNELS), case.k), column.int8, min(case.m, verify.ROWS))
        if key not in self.compared:
            self.compared[key] = verify.against_naive(
                case,
                column,
                self.target,
                self.dtype,
                self.device,
            )
        checks = {"naive": self.compared[key]}
        if column.kind != "quantize":
            say(what="against eager", tile=self._tile(case, column))
            layer = ours.layer_of(case, column, self.dtype, self.device)
            work = ours.work_of(column, *layer, self.target)
            checks["eager"] = verify.against_eager(work.call(*work.operands), *layer)
        found = {name: check.to_json() for name, check in checks.items()}
        bad = [f"relative error {c.error:.3g} against {name}" for name, c in checks.items() if not c.ok]
        if bad:
            raise Wrong(f"wrong output: {', '.join(bad)}", found)
        return found

    def time(self, given, group, say) -> dict:
        case, column = self._layer(given)
        say(what="timing", tile=self._tile(case, column))
        layer = ours.layer_of(case, column, self.dtype, self.device)
        return self._timed(ours.work_of(column, *layer, self.target))

    def baseline(self, given, group, say) -> dict:
        case = cases.Case(**given["layer"])
        build = (baselines.TORCH | baselines.KITCHEN)[given["name"]]
        try:
            return self._timed(build(case, self.target, self.dtype, self.device))
        except (Refused, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # another project's: no fault of the pack's
            if not self.usable():
                raise
            raise Refused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error

    def model(self, given, group, say) -> dict:
        size, grain, lora = model.Size(**given["size"]), given["grain"], given["lora"]
        dtype = getattr(torch, given["dtype"]) if "dtype" in given else self.dtype
        key = (grain, lora, size.double, size.single, dtype)
        if self.held[0] != key:
            self._let_go()
            self.held = (
                key,
                model.build(
                    size,
                    dtype,
                    self.device,
                    grain,
                    lora,
                ),
            )
        held = self.held[1]
        assert held is not None
        with self.sensors.reading() as sensors:
            found = model.step(held, size, dtype, self.device)
        if not found["finite"]:
            raise Wrong("the output is not finite", found)
        return found | {"sensors": sensors, "paths": model.paths(held, self.target)}

    def tune(self, given, group, say) -> dict:
        case, column = self._layer(given)
        say(what="tuning", tile=given["tile"])
        with self.sensors.reading() as sensors:
            found = self._candidates(case, column).time(Tile(**given["tile"]), group)
        return found | {"sensors": sensors}

    def _candidates(self, case, column) -> Candidates:
        """Of the product that was tuned last, or anew: operands and the default's output are kept."""
        if self.tuned[0] != (case, column):
            self._let_go()
            self.tuned = (
                (case, column),
                Candidates(
                    case,
                    column,
                    self.target,
                    self.dtype,
                    self.device,
                ),
            )
        assert self.tuned[1] is not None
        return self.tuned[1]

    def _let_go(self):
        """Gives back the memory of what an earlier case has kept for the next one."""
        if (self.held[1], self.tuned[1]) != (None, None):
            self.held = self.tuned = (None, None)
            model.free()

    def host(self, given, group, say) -> dict:
        backend, arch, triton, *rest = given["target"]
        return host_cost.step(Target(backend, arch, triton and tuple(triton), *rest))

    def cpu(self, given, group, say) -> dict:
        return cpu.layer(given["n"], given["k"], given["m"])

    def fit(self, given, group, say) -> dict:
        with self.sensors.reading() as sensors:
            return fits.fit(given["layer"], given["method"], str(self.device)) | {"sensors": sensors}

    def calibration(self, given, group, say) -> dict:
        return fits.calibration(self.device)

    def _timed(self, work: timing.Work) -> dict:
        self._let_go()
        with self.sensors.reading() as sensors:
            taken = timing.measure(work, self.device)
        return taken.to_json() | {"note": work.note, "sensors": sensors}

    def _layer(self, given) -> tuple[cases.Case, cases.Column]:
        return cases.Case(**given["layer"]), self.columns[given["column"]]

    def _tile(self, case: cases.Case, column: cases.Column) -> dict | None:
        """Of the product that the column launches; None where it launches none, or several."""
        target = column.target(self.target)
        if column.kind == "quantize" or len(lower(column.spec(case.n, case.k), target)) > 1:
            return None
        return asdict(gemm_tile(target, problem_of(case, column, self.target)))
