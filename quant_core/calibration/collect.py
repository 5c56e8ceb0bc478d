"""Runs the samples with hooks on, pass by pass; every finished sample can be resumed from."""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ..layer.statistics import InputStatistics, NonFiniteActivation
from ..store.atomic import leftovers, remove_temporary, require_folder, require_room, scratch_folder
from ..store.lock import only_run
from ..store.progress import Progress, silent
from ..store.settings import differences
from . import file
from .capture import Capture
from .plan import Input, plan_passes
from .replay import Chained, Span, cost_text, spans_of
from .spill import Spill, free_memory
from .tape import UNFIT, NoReplay, Tape
from .trajectory import Recorder

REPLAY = "replay"  # names the folder of what a replay keeps on disk, while it runs


@dataclass
class Work:
    """A calibration under way: how it samples, what of, and where to. The fields are `calibrate`'s."""

    run: Callable[[int, Capture], None]
    modules: dict[str, torch.nn.Module]
    folder: Path
    meta: dict
    samples: int
    seed: int
    reservoir: int
    place: Callable[[int], torch.device | str]
    progress: Progress
    say: Callable[[str], None]
    begin: Callable[[int, int], None]
    passes: list[list[Input]]
    chained: Chained | None
    spans: list[Span] | None

    def path(self, index: int) -> Path:
        return self.folder / f"pass-{index:03d}.safetensors"

    def done(self) -> list[int]:
        """Samples of each pass that are in its file."""
        return [_done(self.path(i)) for i in range(len(self.passes))]


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
    chained: Chained | None = None,
    say: Callable[[str], None] = logging.info,
    begin: Callable[[int, int], None] = lambda kept, runs: None,
) -> file.Calibration:
    """Gathers the statistics of `inputs` into `folder` and opens them.

    run(sample, capture): one sampling run; it calls `capture.at` before each evaluation of the model. `meta`
    names the model ("model") and everything else that decides the outcome; a folder made with the same goes
    on after its last saved sample, with the same result as a run that was never stopped. Raises
    CalibrationError for one made with other `meta`, naming what differs, and Busy. memory: bytes for the
    statistics of one pass; more passes over the samples where it is not enough. place(bytes) makes room for a
    pass and says on which device; it is called before the pass samples, so that the model is loaded around
    it. chained: the network whose blocks the passes behind the first run again; without it, or where the
    network cannot be run again, they sample again. say: told in a line what the work is.
    begin: told before the first sample how many of how many runs, one a sample and pass, are kept.
    """
    folder = Path(folder)
    meta = meta | {"samples": samples, "seed": seed, "reservoir": reservoir}
    require_folder(folder)
    with only_run(folder, "calibrates"):
        # Gigabytes, of a run that was killed.
        for left in leftovers(folder / REPLAY) if folder.is_dir() else ():
            remove_temporary(left)
        if finished := _finished(folder, meta, inputs):
            return finished  # whatever the memory it was gathered in
        spans = None
        if chained is not None:
            passes = plan_passes(inputs, memory, reservoir, whole_blocks=True)
            spans = spans_of(passes, modules, chained)
        if spans is None:
            passes = plan_passes(inputs, memory, reservoir)
        meta |= {"passes": len(passes), "plan": [[i.name for i in p] for p in passes]}
        _require_own(folder, meta)
        size = sum(InputStatistics.nbytes(i.width, i.blocks, reservoir) for i in inputs)
        require_room(folder, size - sum(path.stat().st_size for path in folder.glob("pass-*.safetensors")))
        given = run, modules, folder, meta, samples, seed, reservoir, place, progress, say, begin
        return _gathered(Work(*given, passes, chained, spans))


def _gathered(work) -> file.Calibration:
    done = work.done()
    todo = [i for i, n in enumerate(done) if n < work.samples]
    spans = None if work.spans is None or len(todo) < 2 else [work.spans[i] for i in todo]
    if any(done):
        kept = len(done) - len(todo)
        work.say(
            f"Nibble: goes on; {kept} of {len(done)} passes are kept, and of the next {done[todo[0]]} samples"
        )
    if len(work.passes) > 1:
        blocks = 0 if work.chained is None else len(work.chained.blocks)
        work.say(f"Nibble: {cost_text(len(todo), spans, blocks)}")
    if spans is None:
        _run(work, todo, done, None)
        return file.Calibration(work.folder)
    with scratch_folder(work.folder / REPLAY) as scratch:
        tape = Tape(
            work.chained.network,
            list(work.chained.blocks.values()),
            Spill(scratch, free_memory() // 4),
            spans[1].first,
            [span.stop for span in spans],
        )
        try:
            _run(work, todo, done, tape)
            return file.Calibration(work.folder)
        except NoReplay as error:
            logging.warning(
                f"Nibble: the blocks cannot be run again ({error}); the passes that are left sample instead. "
                "The statistics are the same."
            )
    done = work.done()
    _run(work, [i for i, n in enumerate(done) if n < work.samples], done, None)
    return file.Calibration(work.folder)


def _run(work, todo, done, tape):
    """Gathers the passes `todo`, of which `done` samples each are saved. With a tape the first one samples
    all, also those that are saved already: for the tape alone."""
    plan = [(i, s) for i in todo for s in range(0 if tape and i == todo[0] else done[i], work.samples)]
    statistics: dict[str, InputStatistics] = {}
    current, saved, cost = None, 0.0, 0.0
    runs = len(work.passes) * work.samples
    work.begin(runs - len(plan), runs)
    for index, sample in work.progress(plan, len(plan)):
        path = work.path(index)
        if index != current:
            if current is not None and tape:
                _next_pass(work, tape, current, index)
            current, saved = index, time.monotonic()
            statistics, recorder = _begun(work, index, done[index])
        capture = Capture(statistics, work.seed, work.samples, None if index else recorder, tape)
        capture.sample = sample
        if tape and index != todo[0]:
            _replayed(work, tape, capture, index, todo)
        else:
            _sampled(work, capture, sample < done[index])
        if sample < done[index]:
            continue
        # Where saving takes over a second (a pass of FLUX writes gigabytes), it may take a tenth of the time,
        # no more.
        if sample == work.samples - 1 or cost < 1 or time.monotonic() - saved >= 10 * cost:
            started = time.monotonic()
            file.save(path, statistics, work.meta | {"done": sample + 1, "pass": index}, recorder)
            saved = time.monotonic()
            cost = saved - started


def _begun(work, index, done):
    """(the statistics, the recorder) that a pass goes on with, behind `done` samples."""
    path, group = work.path(index), work.passes[index]
    statistics = _resume(path, group) if done else {i.name: i.statistics(work.reservoir) for i in group}
    recorder = file.read_recorder(path) if done else Recorder()
    device = work.place(sum(InputStatistics.nbytes(i.width, i.blocks, work.reservoir) for i in group))
    for s in statistics.values():
        s.to(device)
    return statistics, recorder


def _sampled(work, capture, known):
    """One sampling run. known: its statistics are saved already, the tape alone is to be filled."""
    tape, sample = capture.tape, capture.sample
    if known:
        capture = Capture({}, work.seed, work.samples, None, tape)
        capture.sample = sample
    with capture.hooked(work.modules), tape.sampling() if tape else nullcontext():
        work.run(sample, capture)
    if tape:
        tape.require_room(sample + 1, work.samples)


def _replayed(work, tape, capture, index, todo):
    """One sampling run's blocks of a pass, again on what was recorded of them."""
    later = todo[todo.index(index) + 1 :]
    boundary = work.spans[later[0]].first if later else None

    played = []

    def play():
        played.append(capture.sample)
        for call in tape.of_sample(capture.sample):
            capture.at(call.step, call.timestep)
            tape.play(call, work.spans[index].stop, boundary)

    capture.tape = None
    try:
        with capture.hooked(work.modules):
            work.chained.within(capture.sample, play)
        tape.checked()
        if played != [capture.sample]:
            raise NoReplay("the host has not let the network run")
    except (NonFiniteActivation, NoReplay, torch.OutOfMemoryError):
        raise
    except UNFIT as error:
        raise NoReplay(f"{type(error).__name__}: {error}") from error


def _next_pass(work, tape, before, index):
    """Raises NoReplay where the sampling has left nothing to replay; else goes to the next boundary."""
    if tape.reason:
        raise NoReplay(tape.reason)
    memory, disk = tape.spill.most
    if tape.boundary != work.spans[index].first:
        tape.advance(work.spans[index].first)
    logging.info(
        f"Nibble: pass {before + 1} is done; the inputs of the next blocks take {memory / 1e9:.1f} GB of "
        f"memory and {disk / 1e9:.1f} GB on disk until the end"
    )


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
