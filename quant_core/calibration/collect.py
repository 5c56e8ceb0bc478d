"""Runs the samples with hooks on, pass by pass; every finished sample can be resumed from."""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from ..layer.statistics import TOKENS, InputStatistics, peaks_of, reservoir_keys
from ..store.atomic import require_folder, require_room
from ..store.lock import only_run
from ..store.progress import Progress, silent
from ..store.settings import differences
from . import file
from .observe import rows_of
from .plan import plan_passes
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
    ):
        self.statistics, self.seed, self.samples, self.recorder = statistics, seed, samples, recorder
        self.sample, self.step, self.timestep = 0, 0, 0.0
        self.calls: dict[str, int] = {}
        self._peaks: list[tuple[InputStatistics, torch.Tensor, int]] = []

    def at(self, step: int, timestep: float, args: tuple = (), kwargs: dict | None = None):
        """Called before each evaluation of the model, network(*args, **kwargs); without arguments nothing is
        recorded of it."""
        self.settle()
        self.step, self.timestep, self.calls = step, timestep, {}
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


def calibrate(
    run: Callable[[int, Capture], None],
    modules: dict[str, torch.nn.Module],
    inputs: list,
    folder: Path,
    meta: dict,
    *,
    samples: int,
    memory: int,
    seed: int = 0,
    reservoir: int = 1024,
    place: Callable[[int], torch.device | str] = lambda nbytes: "cpu",
    progress: Progress = silent,
) -> file.Calibration:
    """Gathers the statistics of `inputs` into `folder` and opens them.

    run(sample, capture): one sampling run; it calls `capture.at` before each evaluation of the model. `meta`
    names the model ("model") and everything else that decides the outcome; a folder made with the same goes
    on after its last saved sample, with the same result as a run that was never stopped. Raises
    CalibrationError for one made with other `meta`, naming what differs, and Busy. memory: bytes for the
    statistics of one pass; more passes over the samples where it is not enough. place(bytes) makes room for a
    pass and says on which device; it is called before the pass samples, so that the model is loaded around
    it.
    """
    folder = Path(folder)
    meta = meta | {"samples": samples, "seed": seed, "reservoir": reservoir}
    require_folder(folder)
    with only_run(folder, "calibrates"):
        return _gathered(
            run, modules, inputs, folder, meta, samples, memory, seed, reservoir, place, progress
        )


def _gathered(
    run, modules, inputs, folder, meta, samples, memory, seed, reservoir, place, progress
) -> file.Calibration:
    if finished := _finished(folder, meta, inputs):
        return finished  # whatever the memory it was gathered in
    passes = plan_passes(inputs, memory, reservoir)
    meta |= {"passes": len(passes), "plan": [[i.name for i in p] for p in passes]}
    _require_own(folder, meta)
    size = sum(InputStatistics.nbytes(i.width, i.blocks, reservoir) for i in inputs)
    require_room(folder, size - sum(path.stat().st_size for path in folder.glob("pass-*.safetensors")))
    work = []
    for index, group in enumerate(passes):
        path = folder / f"pass-{index:03d}.safetensors"
        done = _done(path)
        work += [(index, path, group, sample) for sample in range(done, samples)]
    statistics: dict[str, InputStatistics] = {}
    current, saved, cost = None, 0.0, 0.0
    for index, path, group, sample in progress(work, len(work)):
        if index != current:
            current, saved = index, time.monotonic()
            statistics = _resume(path, group) if sample else {i.name: i.statistics(reservoir) for i in group}
            recorder = file.read_recorder(path) if sample else Recorder()
            device = place(sum(InputStatistics.nbytes(i.width, i.blocks, reservoir) for i in group))
            for s in statistics.values():
                s.to(device)
        capture = Capture(statistics, seed, samples, None if index else recorder)
        capture.sample = sample
        with capture.hooked(modules):
            run(sample, capture)
        # Where saving takes over a second (a pass of FLUX writes gigabytes), it may take a tenth of the time,
        # no more.
        if sample == samples - 1 or cost < 1 or time.monotonic() - saved >= 10 * cost:
            started = time.monotonic()
            file.save(path, statistics, meta | {"done": sample + 1, "pass": index}, recorder)
            saved = time.monotonic()
            cost = saved - started
    return file.Calibration(folder)


def _finished(folder, meta, inputs):
    try:
        found = file.Calibration(folder)
    except file.CalibrationError:
        return None
    return found if _same(found.meta, meta) and set(found.names) == {i.name for i in inputs} else None


def _require_own(folder, meta):
    """Hours of another run are never removed; what cannot be read stays under another name."""
    for path in sorted(folder.glob("pass-*.safetensors")):
        try:
            found = file.read_meta(path)
        except file.NoCalibration as error:
            raise file.CalibrationError(
                f"{error}, and would be written over. Name another folder, or move it."
            ) from error
        except file.CalibrationError as error:
            aside = path.with_name(f"{path.name}.damaged")
            os.replace(path, aside)
            logging.warning(
                f"Nibble: {error} It is now {aside.name}; its part of the calibration is gathered again."
            )
            continue
        if not _same(found, meta):
            differ = "; ".join(differences(found, json.loads(json.dumps(meta)), list(meta))[:3])
            raise file.CalibrationError(
                f"{folder}: holds {found.get('done')} of {found.get('samples')} samples of another "
                f"calibration ({differ}). Name another "
                "folder, or move or remove this one; with the same options a stopped calibration goes on."
            )


def _same(found, meta) -> bool:
    return all(found.get(k) == v for k, v in json.loads(json.dumps(meta)).items())


def _done(path) -> int:
    """Samples already in the file."""
    return file.read_meta(path)["done"] if path.is_file() else 0


def _resume(path, group):
    found = file.read_meta(path)["inputs"]
    if missing := [i.name for i in group if i.name not in found]:
        raise file.CalibrationError(
            f"calibration file {path}: no statistics of layer {missing[0]}. Move it, and run the "
            "calibration again."
        )
    return {i.name: file.read_statistics(path, i.name, found[i.name]) for i in group}
