"""Hooks that feed statistics with the inputs of layers, and what a sampling run tells them."""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import count

import torch

from ..layer.statistics import TOKENS, InputStatistics, peaks_of, reservoir_keys
from .observe import rows_of
from .tape import Tape
from .trajectory import Recorder


def is_held_out(sample: int, samples: int) -> bool:
    """Every fourth sample (the last of fewer) feeds the held-out tokens and no fit. A lone sample feeds
    both."""
    return sample % 4 == 3 or (samples < 4 and sample == samples - 1)


def first_tensor(value) -> torch.Tensor | None:
    """The first tensor in any nesting of lists, tuples and dicts; None where there is none."""
    if isinstance(value, torch.Tensor):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((t for v in inner if (t := first_tensor(v)) is not None), None)


class Capture:
    """Forward pre-hooks that feed statistics. `step` and `timestep` say where in the sampling x belongs."""

    def __init__(
        self,
        statistics: dict[str, InputStatistics],
        seed: int,
        samples: int,
        recorder: Recorder | None = None,
        tape: Tape | None = None,
    ):
        self.statistics, self.seed, self.samples, self.recorder = statistics, seed, samples, recorder
        self.tape = tape
        self.sample, self.step, self.timestep = 0, 0, 0.0
        self.calls: dict[str, int] = {}
        self._peaks: list[tuple[InputStatistics, torch.Tensor, int]] = []

    def at(self, step: int, timestep: float, args: tuple = (), kwargs: dict | None = None):
        """Called before each evaluation of the model, network(*args, **kwargs); without arguments nothing is
        recorded of it."""
        self.settle()
        self.step, self.timestep, self.calls = step, timestep, {}
        if self.tape is not None:
            self.tape.begin(self.sample, step, timestep, args, kwargs or {})
        if self.recorder is not None and (args or kwargs):
            self.recorder.add(
                self.seed,
                self.sample,
                step,
                timestep,
                is_held_out(self.sample, self.samples),
                args,
                kwargs or {},
            )

    def settle(self):
        """Ends a step: waits for the device once, and raises NonFiniteActivation for the first call of a
        layer whose input was not finite."""
        peaks, self._peaks = self._peaks, []
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for _, found, _ in peaks:
            by_device.setdefault(found.device, []).append(found.amax())
        largest = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}
        for stats, found, tokens in peaks:
            stats.require_finite(next(largest[found.device]), found, tokens, self.sample, self.step)
        for stats in self.statistics.values():
            stats.take_offered()

    @contextmanager
    def watched(
        self,
        network: torch.nn.Module,
        timestep: Callable[[tuple, dict], float],
        prepare: Callable[[dict], dict] = lambda k: k,
    ):
        """Calls `at` before each evaluation of the network, counted from 0. timestep(args, kwargs);
        prepare(kwargs): the ones to use instead."""
        steps = count()

        def before(module, args, kwargs):
            kwargs = prepare(kwargs)
            self.at(next(steps), timestep(args, kwargs), args, kwargs)
            return args, kwargs

        handle = network.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def hooked(self, modules: dict[str, torch.nn.Module]):
        """modules: input name -> the module whose input it is."""
        missing = set(self.statistics) - set(modules)
        if missing:
            raise KeyError(f"the model has no module for the inputs {sorted(missing)[:3]}")
        handles = [modules[name].register_forward_pre_hook(self._hook(name)) for name in self.statistics]
        try:
            yield
            self.settle()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name):
        stats = self.statistics[name]

        def hook(module, args):
            x = rows_of(module, args[0]).detach().reshape(-1, stats.width)
            call = self.calls[name] = self.calls.get(name, 0) + 1
            if not len(x):
                return
            held_out, peaks = is_held_out(self.sample, self.samples), peaks_of(x)
            self._peaks.append((stats, peaks, stats.count + len(x)))
            keys = None
            if held_out or len(x) > TOKENS:
                keys = reservoir_keys(self.seed, name, self.sample, self.step, call, len(x))
            if held_out:
                stats.offer(x, keys, self.timestep)
            if not held_out or self.samples == 1:
                stats.add(x, peaks, keys)

        return hook
