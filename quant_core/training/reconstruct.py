"""Trains quantized layers on what their blocks put out, and runs of blocks on what the network predicts.

Block-output reconstruction (FlatQuant, section 3.2; BRECQ, arXiv 2102.05426), from the inputs that the
quantized blocks before really give and against the full-precision run's outputs, so that a block also
corrects what came in wrong. The same on longer runs, up to the network's own prediction, is RobuQ's
distillation in parts.

The loss has a second term beside the mean squared error: the energy of the error's mean over calls of one
sampling run. A sampler adds its predictions up, so that what they have in common in their errors grows with
the steps, the rest with their root. In the small FLUX the mean's energy orders methods as their pictures do,
the mean squared error does not: SplitQuant with fitted clips has predictions of 19.3 dB and pictures of 32.2,
without 18.5 and 33.7; their means have 25.4 and 26.4 dB.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..calibration.segments import Chain, State, replaced
from ..store import digests
from ..store.atomic import save_tensors
from ..store.safe import open_safetensors
from .mutation import mutation_allowed
from .student import Student

Modules = dict[str, list[tuple[torch.nn.Module, slice]]]  # {layer: the modules that hold its rows}
# Of a run's steps; after each the held-out calls judge, and the best state is kept: the small FLUX overfits
# to 24 pictures.
WINDOWS = 8
DIVERGED = 2.0  # times the loss of the first window
HEADER = "nibble_training"  # header entry of a checkpoint
_PLAIN = ("least", "losses", "unit", "start")  # of its state, what is no tensor


@dataclass(frozen=True)
class TrainConfig:
    """kinds: of KINDS (methods/student.py). steps: of AdamW on each run, at `rate` with a cosine to nothing.
    calls: recorded calls of one sampling run that a step looks at; coherence: weight of the energy of their
    mean error. isolate: each stream's loss reaches its own layers only. adaptive: blocks whose error is
    amplified on its way to the prediction learn slower. affine: see Student. bins: weights of the loss by
    timestep, evenly from the first step of sampling to the last, () for 1.
    """

    kinds: tuple[str, ...] = ("scale", "bias")
    steps: int = 100
    rate: float = 2e-3
    calls: int = 4
    coherence: float = 4.0
    isolate: bool = True
    adaptive: bool = True
    affine: bool = False
    bins: tuple[float, ...] = ()
    seed: int = 0


@dataclass
class Run:
    """Blocks first .. stop - 1 of a chain (stop = len + 1: to the prediction) with what goes in and should
    come out of each call.

    calls: recorded calls to train on; held: those to judge by. sample, weight: of each call. inputs: None
    from the start.
    """

    first: int
    stop: int
    calls: list[int]
    held: list[int]
    sample: dict[int, int]
    weight: dict[int, float]
    inputs: dict[int, State] | None
    targets: dict[int, State]


@dataclass
class Trained:
    """What came of a run. losses: of each step, 1 where it began; note: why it stopped early, "" where it did
    not."""

    losses: list[float]
    note: str = ""


@contextmanager
def installed(layers: Mapping[str, Callable], modules: Modules):
    """The modules of each layer compute its rows: `Student`s in training, packed layers otherwise."""
    forwards = {}
    for name, layer in layers.items():
        for module, rows in modules[name]:
            forwards[module] = _rows_of(layer, rows)
    with replaced(forwards):
        yield


def _rows_of(layer, rows):
    if isinstance(layer, Student):
        return lambda x: layer(x, rows)
    return lambda x: layer(x)[..., rows]


def errors(chain: Chain, run: Run, calls: list[int]) -> Iterator[list[torch.Tensor]]:
    """The error of each output of the run, call by call, times the root of the call's weight."""
    for c in calls:
        got = chain.run(c, run.first, run.stop, None if run.inputs is None else run.inputs[c])
        yield [
            run.weight[c] ** 0.5 * (g.float() - w.to(g.device).float())
            for g, w in zip(got, run.targets[c], strict=True)
        ]


def losses_of(chain: Chain, run: Run, calls: list[int], coherence: float) -> list[torch.Tensor]:
    """The loss of each output over calls of one sampling run: mean |e|^2 + coherence * n * |mean e|^2, n
    their number."""
    squares: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    for found in errors(chain, run, calls):
        now = [e.square().mean() / len(calls) for e in found]
        squares = [a + b for a, b in zip(squares, now, strict=True)] if squares else now
        if coherence:
            part = [e / len(calls) for e in found]
            means = [a + b for a, b in zip(means, part, strict=True)] if means else part
    return (
        [s + coherence * len(calls) * m.square().mean() for s, m in zip(squares, means, strict=True)]
        if coherence
        else squares
    )


@torch.no_grad()
def judged(chain: Chain, run: Run, layers, modules: Modules, coherence: float) -> list[float]:
    """`losses_of` the held-out calls, the mean of their sampling runs, with `layers` in place."""
    by_sample = _by_sample(run, run.held)
    with installed(layers, modules):
        found = [losses_of(chain, run, calls, coherence) for calls in by_sample.values()]
    return [float(sum(f[i] for f in found)) / len(found) for i in range(len(found[0]))]


def train(
    chain: Chain,
    run: Run,
    students: dict[str, Student],
    modules: Modules,
    config: TrainConfig,
    stream_of: Callable[[str], int | None] = lambda name: None,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], bool] = lambda step, loss: False,
) -> Trained:
    """Trains the students in place on the calls of the run.

    stream_of(layer): index of the output that is its own, None for all. checkpoint: file to go on from,
    written where on_step(step, loss) says so or raises; the end is the same as without a stop. A loss that is
    not finite, or doubles, ends the training at its best state so far.
    """
    owners = {p: name for name, student in students.items() for p in student.parameters()}
    optimizer = torch.optim.AdamW(
        [g for student in students.values() for g in student.groups(config.rate)], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    state = _State(students, optimizer, schedule, config.steps)
    state.load(checkpoint)
    by_sample = _by_sample(run, run.calls)
    held = lambda: judged(chain, run, students, modules, config.coherence)
    with installed(students, modules):
        if state.start is None:
            state.start = held()
        for step in range(len(state.losses), config.steps):
            for student in students.values():
                student.renew()
            # ComfyUI's blocks add to their streams in place.
            with mutation_allowed():
                losses = losses_of(chain, run, _picked(by_sample, config, step), config.coherence)
                if state.unit is None:
                    state.unit = [max(float(loss.detach()), 1e-20) for loss in losses]
                losses = [loss / unit for loss, unit in zip(losses, state.unit, strict=True)]
                if note := state.seen(sum(float(loss.detach()) for loss in losses) / len(losses)):
                    return Trained(state.losses, note)
                optimizer.zero_grad()
                _backward(losses, owners, stream_of if config.isolate else lambda name: None)
            optimizer.step()
            schedule.step()
            if (step + 1) % state.window == 0 or step + 1 == config.steps:
                for student in students.values():
                    student.renew()
                state.judge(held())
            due = True  # also where on_step raises an interrupt
            try:
                due = on_step(step, state.losses[-1])
            finally:
                if due and checkpoint is not None:
                    state.save(checkpoint)
    state.best()
    return Trained(state.losses)


def _by_sample(run, calls) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for c in calls:
        out.setdefault(run.sample[c], []).append(c)
    return out


def _picked(by_sample, config, step) -> list[int]:
    """The calls of a step, a function of the seed and the step alone: a resumed run sees the same."""
    g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    samples = sorted(by_sample)
    calls = by_sample[samples[int(torch.randint(len(samples), (), generator=g))]]
    return [calls[i] for i in torch.randperm(len(calls), generator=g)[: config.calls].tolist()]


def _backward(losses, owners, stream_of):
    """Gradients of the sum, or of each stream's loss for its own layers."""
    parameters = [p for p in owners if p.requires_grad]
    for i, loss in enumerate(losses):
        own = [p for p in parameters if len(losses) == 1 or stream_of(owners[p]) in (None, i)]
        grads = torch.autograd.grad(loss, own, retain_graph=i < len(losses) - 1, allow_unused=True)
        for p, g in zip(own, grads, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g


class _State:
    """Students and optimizer as they are, and the parameters that did best on the held-out calls, the start
    among them."""

    def __init__(self, students, optimizer, schedule, steps):
        self.students, self.optimizer, self.schedule = (
            torch.nn.ModuleList(students.values()),
            optimizer,
            schedule,
        )
        self.window = max(1, steps // WINDOWS)
        self.losses, self.unit, self.start, self.good, self.least = [], None, None, self._copy(), 1.0

    def _copy(self):
        return [p.detach().clone() for p in self.students.parameters()]

    def _mean(self, window):
        part = self.losses[window * self.window : (window + 1) * self.window]
        return sum(part) / len(part)

    def seen(self, loss) -> str:
        """Takes a step's loss, of the parameters before it; why the training must end, "" where it need
        not."""
        step = len(self.losses)
        if not math.isfinite(loss):
            self.best()
            return f"loss {loss} at step {step}"
        self.losses.append(loss)
        if (step + 1) % self.window == 0 and (
            mean := self._mean(step // self.window)
        ) > DIVERGED * self._mean(0):
            self.best()
            return f"loss {mean / self._mean(0):.2g} times the first at step {step}"
        return ""

    def judge(self, held):
        """Takes the losses of held-out calls, in units of where they began."""
        ratio = sum(h / max(s, 1e-30) for h, s in zip(held, self.start, strict=True)) / len(held)
        if ratio < self.least:
            self.least, self.good = ratio, self._copy()

    @torch.no_grad()
    def best(self):
        for p, good in zip(self.students.parameters(), self.good, strict=True):
            p.copy_(good)
        for student in self.students:
            student.renew()

    def save(self, path):
        """A safetensors file, with what is no tensor as JSON in its header: Python writes floats so that they
        read back exactly."""
        optimizer = self.optimizer.state_dict()
        tensors = {f"parameters.{i}": p for i, p in enumerate(self._copy())} | {
            f"good.{i}": g for i, g in enumerate(self.good)
        }
        tensors |= {
            f"optimizer.{i}.{k}": t for i, held in optimizer["state"].items() for k, t in held.items()
        }
        plain = {k: getattr(self, k) for k in _PLAIN} | {
            "groups": optimizer["param_groups"],
            "schedule": self.schedule.state_dict(),
        }
        save_tensors(
            path, {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {HEADER: json.dumps(plain)}
        )

    @torch.no_grad()
    def load(self, path):
        """Goes on from the file at `path`, if there is one. One that is damaged or of other students is not
        trusted: the run starts again."""
        if path is None or not path.is_file():
            return
        parameters = list(self.students.parameters())
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            digests.verify(path, open_safetensors(path))
            with safe_open(path, "pt") as f:
                plain, keys = json.loads(f.metadata()[HEADER]), list(f.keys())
                now = [_copied(f.get_tensor(f"parameters.{i}"), p) for i, p in enumerate(parameters)]
                good = [_copied(f.get_tensor(f"good.{i}"), p) for i, p in enumerate(parameters)]
                state = {}
                for key in (k for k in keys if k.startswith("optimizer.")):
                    _, i, name = key.split(".")
                    # Which AdamW keeps on the CPU.
                    like = torch.empty(()) if name == "step" else trained[int(i)]
                    state.setdefault(int(i), {})[name] = _copied(f.get_tensor(key), like)
            found, schedule = {k: plain[k] for k in _PLAIN}, dict(plain["schedule"])
            groups = [
                {k: tuple(v) if isinstance(own[k], tuple) else v for k, v in group.items()}
                for own, group in zip(self.optimizer.param_groups, plain["groups"], strict=True)
            ]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.schedule.load_state_dict(schedule)
        except (
            SafetensorError,
            RuntimeError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            return
        for p, value in zip(parameters, now, strict=True):
            p.copy_(value)
        self.good = good
        for k, value in found.items():
            setattr(self, k, value)


def _copied(tensor, like):
    """A copy where and as `like` lies in memory. The file is replaced while the run goes on, which Windows
    refuses for one that is mapped."""
    if tensor.shape != like.shape:
        raise ValueError(f"expected the shape {tuple(like.shape)}, found {tuple(tensor.shape)}")
    return torch.empty_like(like).copy_(tensor)
