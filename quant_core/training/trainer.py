"""Goes through a network run after run of blocks: what goes in and should come out of each is carried along,
for every recorded call."""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import cast

import torch

from ..calibration.file import Calibration
from ..calibration.gains import of_calibration
from ..calibration.replay import is_chain
from ..calibration.segments import Chain
from ..calibration.trajectory import Trajectory
from ..families import Family, Layer
from ..layer.chunks import power_db
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem
from ..layer.soundness import naming
from ..store.atomic import file_name, save_text
from ..store.progress import Progress, silent
from .presets import Preset
from .reconstruct import Modules, Run, TrainConfig, installed, judged, train
from .rounding import round_again
from .student import Student

SAVE_EVERY = 60.0  # seconds between checkpoints within a run
LOSSES = "losses.json"  # in a run's folder
TRAINING = ".training"  # the state of a training under way


class NoTrajectory(ValueError):
    """Training was asked for, and the calibration has no recorded calls."""


def require_trajectory(calibration: Calibration | None):
    """Raises NoTrajectory where there is nothing to train on."""
    if calibration is None:
        raise NoTrajectory("training needs a calibration, found none")
    if calibration.trajectory() is None:
        raise NoTrajectory(
            f"calibration {calibration.path}: holds no recorded inputs of the network to train on, as "
            "those made before version 0.4 or merged. "
            "Calibrate again, or set training to none."
        )


class NoChain(ValueError):
    """Training was asked for, and the model's blocks do not stand one behind the other."""


def require_chain(family: Family, plan: list[Layer]):
    """Raises NoChain where blocks read more than the one before: it would be trained with zeros in their
    place. plan: the layers."""
    if not is_chain(family, plan):
        raise NoChain(
            f"training goes through a model's blocks one after the other, and those of {family.title} also "
            "read what other blocks computed. "
            "Set training to none."
        )


@dataclass
class Outcome:
    """Of one run. gain_db: of the held-out loss; kept: whether the trained layers were taken; note: why
    training ended early."""

    name: str
    gain_db: float
    kept: bool
    note: str
    losses: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        """For a row of the report."""
        what = (
            f"trained {self.gain_db:+.1f} dB"
            if self.kept
            else f"kept its start ({self.gain_db:+.1f} dB trained)"
        )
        return f"{what}, {self.note}" if self.note else what


class Trainer:
    """`begin` at the network's input, then `run` or `skip` blocks in order, up to the last; and again, where
    runs are longer.

    network: in full precision, on its device; blocks: names of its modules; modules: where each layer's rows
    are. folder: for checkpoints and losses.json. stream_of: see `train`. gains: {block: how much of its error
    arrives at the prediction} for TrainConfig.adaptive. check(): called at each step, to move a progress bar
    or to raise an interrupt. Memory: two sets of boundary tensors on the CPU, for FLUX at 512 px 13 MB a call
    and set.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        blocks: list[str],
        modules: Modules,
        trajectory: Trajectory,
        folder: Path,
        device="cpu",
        stream_of: Callable[[str], int | None] = lambda name: None,
        gains: dict[str, float] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.chain = Chain(network, blocks, lambda index: trajectory.run(network, index, device))
        self.network, self.modules, self.folder, self.stream_of, self.check = (
            network,
            modules,
            Path(folder),
            stream_of,
            check,
        )
        calls = trajectory.calls
        self.sample = {i: c.sample for i, c in enumerate(calls)}
        self.held = [i for i, c in enumerate(calls) if c.held_out]
        self.calls = [i for i, c in enumerate(calls) if not c.held_out] or self.held
        self.recorded = calls
        self.gains = gains or {}

    @property
    def losses(self) -> Path:
        """{run: its losses, gain and note} as JSON."""
        return self.folder / LOSSES

    def begin(self, config: TrainConfig):
        """Back to the network's input, to train by `config`."""
        self.config, self.weight = config, _weights(self.recorded, config.bins)
        self.at, self.full, self.quantized = 0, None, None

    def run(
        self,
        stop: int,
        problems: dict[str, Problem],
        layers: dict[str, QuantizedLayer],
        name: str,
        made_from: str = "",
    ):
        """Trains the blocks up to `stop` (one past the last: to the prediction) from `layers`, those of the
        blocks, on `problems`, their full-precision weights. Returns (layers, Outcome) and goes on behind
        them. made_from: hash of the weights that all this depends on; the state of a training on others is
        not gone on with.
        """
        with torch.inference_mode(False):
            layers = _in_own_memory(layers)
            run = Run(
                self.at,
                stop,
                self.calls,
                self.held,
                self.sample,
                self.weight,
                self.quantized,
                self._outputs(stop, self.full, {}),
            )
            others = {n: layer for n, layer in layers.items() if layer.spec.weight_only}  # left as they are
            students = {n: self._student(problems[n], layers[n]) for n in layers if n not in others}
            before = judged(self.chain, run, layers, self.modules, self.config.coherence)
            with torch.enable_grad(), installed(others, self.modules), self._own_tensors(stop):
                config = self.config if name not in self.gains else _slower(self.config, self.gains, name)
                checkpoint = self.folder / f"{file_name(name + made_from)}{TRAINING}"
                done = train(
                    self.chain, run, students, self.modules, config, self.stream_of, checkpoint, self._ticks()
                )
            trained = layers | {n: s.layer() for n, s in students.items()}
            offered = [trained]
            # The start may have GPTQ's codes, these are rounded to nearest.
            if {"transform", "smooth"} & set(self.config.kinds):
                offered.append(
                    trained
                    | {
                        n: again
                        for n in students
                        if (again := _rounded_again(problems[n], trained[n])) is not None
                    }
                )
            ratio, trained = min(
                ((self._ratio(run, o, before), o) for o in offered), key=lambda pair: pair[0]
            )
            outcome = Outcome(name, -power_db(ratio, 1.0), ratio < 1, done.note, done.losses)
            layers = trained if outcome.kept else layers
            self._forward(stop, layers, run.targets)
        self._log(outcome)
        checkpoint.unlink(missing_ok=True)
        return layers, outcome

    def _student(self, problem, layer):
        with naming(layer.name, problem.weight, problem.statistics):
            return Student(problem, layer, self.config.kinds, self.config.affine)

    def _ratio(self, run, layers, before):
        """Of the held-out losses to those before, the mean of the outputs; inf where it is not finite."""
        after = judged(self.chain, run, layers, self.modules, self.config.coherence)
        ratio = sum(a / max(b, 1e-30) for a, b in zip(after, before, strict=True)) / len(after)
        return ratio if math.isfinite(ratio) else math.inf

    def skip(self, stop: int, layers: dict[str, QuantizedLayer]):
        """Goes on behind blocks that are done."""
        with torch.inference_mode(False):
            self._forward(stop, _in_own_memory(layers), self._outputs(stop, self.full, {}))

    def _forward(self, stop, layers, targets):
        if stop <= len(self.chain):
            self.quantized = self._outputs(stop, self.quantized, layers)
        self.at, self.full = stop, targets

    @torch.no_grad()
    def _outputs(self, stop, states, layers):
        out = {}
        with installed(layers, self.modules):
            for c in dict.fromkeys([*self.calls, *self.held]):
                self.check()
                state = None if states is None else states[c]
                out[c] = tuple(t.detach().cpu() for t in self.chain.run(c, self.at, stop, state))
        return out

    @contextmanager
    def _own_tensors(self, stop):
        """Parameters and buffers of the modules that gradients pass, copied where they were made under
        inference mode: autograd refuses to keep those. ComfyUI loads models under it."""
        blocks, trained = self.chain.modules, {m for held in self.modules.values() for m, _ in held}
        inside = [m for block in blocks[self.at : min(stop, len(blocks))] for m in block.modules()]
        if stop > len(blocks):
            inside += set(self.network.modules()) - {m for block in blocks for m in block.modules()}
        before = []
        for module in inside:
            for held in (module._parameters, module._buffers) if module not in trained else ():
                for name, tensor in held.items():
                    if tensor is not None and tensor.is_inference():
                        before.append((held, name, tensor))
                        copy = tensor.detach().clone()
                        held[name] = (
                            torch.nn.Parameter(copy, requires_grad=False)
                            if held is module._parameters
                            else copy
                        )
        try:
            yield
        finally:
            for held, name, tensor in before:
                held[name] = tensor

    def _ticks(self):
        saved = monotonic()

        def on_step(step, loss):
            nonlocal saved
            self.check()
            due = monotonic() - saved >= SAVE_EVERY
            saved = monotonic() if due else saved
            return due

        return on_step

    def _log(self, outcome):
        before: dict = {}
        # Damaged ones are left out: the curves are for the eye, a trained block is hours.
        with suppress(ValueError, TypeError, RecursionError):
            if self.losses.is_file():
                found = dict(json.loads(self.losses.read_text(encoding="utf-8")))
                before = {name: run for name, run in found.items() if _is_run(run)}
        entry = {
            "losses": [round(x, 6) for x in outcome.losses],
            "gain_db": round(outcome.gain_db, 3),
            "kept": outcome.kept,
            "note": outcome.note,
        }
        save_text(self.losses, json.dumps(before | {outcome.name: entry}))


def trainer_of(
    network: torch.nn.Module,
    blocks: dict[str, str],
    modules: Modules,
    stream_of: Callable[[str], int | None],
    calibration: Calibration,
    preset: Preset,
    folder: Path,
    device="cpu",
    check: Callable[[], None] = lambda: None,
    progress: Progress = silent,
) -> Trainer:
    """A Trainer of a network in full precision, however it was loaded; how far errors of its blocks go is
    measured first where the preset asks for it.

    blocks: {block of the plan: name of its module in the network}, in order. modules: {layer of the plan:
    [(module, its rows)]}. The rest as in Trainer. Raises the errors of `gains.of_calibration`.
    """
    held = {name: [network.get_submodule(block)] for name, block in blocks.items()}
    gains = None
    if preset.adaptive:
        gains = of_calibration(calibration, list(held), lambda: (network, held), device, progress)
    names, trajectory = list(blocks.values()), cast(Trajectory, calibration.trajectory())
    return Trainer(network, names, modules, trajectory, folder, device, stream_of, gains, check)


def _is_run(run) -> bool:
    """Whether it is what `_log` writes of one."""
    number = lambda value: isinstance(value, (int, float))
    known = isinstance(run, dict) and isinstance(run.get("losses"), list) and number(run.get("gain_db"))
    return known and all(map(number, run["losses"]))


def _in_own_memory(layers: dict[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    """Copies. A memory-mapped tensor lies at any 8 bytes, where products differ in their last bit from those
    at PyTorch's 64: a training that goes on from a file would end elsewhere."""
    return {name: layer.in_memory() for name, layer in layers.items()}


def _rounded_again(problem, layer):
    with naming(layer.name, problem.weight, problem.statistics):
        return round_again(problem, layer)


def _weights(calls, bins) -> dict[int, float]:
    """Weight of each call by its timestep's place between the largest and the smallest, mean 1."""
    if not bins:
        return dict.fromkeys(range(len(calls)), 1.0)
    times = [c.timestep for c in calls]
    top, span = max(times), max(max(times) - min(times), 1e-9)
    raw = [bins[min(int((top - t) / span * len(bins)), len(bins) - 1)] for t in times]
    return {i: r * len(raw) / sum(raw) for i, r in enumerate(raw)}


def _slower(config, gains, name):
    """The rate times the root of the median gain over the block's, at most 1 and at least 1/4."""
    ordered = sorted(gains.values())
    median = ordered[len(ordered) // 2]
    return (
        replace(config, rate=config.rate * min(1.0, max(0.25, (median / max(gains[name], 1e-12)) ** 0.5)))
        if config.adaptive
        else config
    )
