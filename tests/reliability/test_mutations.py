"""Damaged and hostile files: whatever is in one, what comes out is its tensors or an error of ours that names
it, soon and in little memory.

NIBBLE_FUZZ: how many files; NIBBLE_FUZZ_SEED: the number of the first.
"""

import ctypes
import json
import os
import re
import shutil
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from comfyui_nibble.kernels.operator.errors import MESSAGE
from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.convert import convert
from comfyui_nibble.quant_core.convert.inspect import describe, description_text
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.detect import CALIBRATION, FULL, kind_of, open_quantized
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.store import atomic
from comfyui_nibble.tests.reliability.mutations import damaged
from comfyui_nibble.tests.reliability.runs import size_of
from comfyui_nibble.tests.reliability.sound import sound

SECONDS, MEGABYTES = 5.0, 200.0


def read_all(path, out):
    if kind_of(path) == CALIBRATION:
        return
    if kind_of(path) == FULL:
        model = Checkpoint(path)
        for key in model.shapes:
            model.get(key)
        return
    model = open_quantized(path)
    for name in model.specs:
        model.layer(name)
    for key in model.rest:
        model.tensor(key)


def calibration(path, out):
    opened = Calibration(path)
    for name in opened.names:
        opened.get(name)
    trajectory = opened.trajectory()
    for index in range(len(trajectory or ())):
        trajectory.arguments(index)


def inspected(path, out):
    found = describe(path, "cpu")
    text = description_text(found)
    json.dumps(found)
    assert text.replace("\n", "").isprintable(), "control characters in the text"


def converted(path, out):
    to = list(convert.TARGETS)[int(path.stem[1:]) // 10 % len(convert.TARGETS)]
    try:
        convert.convert(convert.plan(open_quantized(path), to), out, lossy=True)
    except BaseException:
        assert not out.exists(), "a file under the final name"
        raise


def quantized(path, out):
    method = by_name("rtn")
    quantize_file(path, out, method, method.config)


STAGES = {
    "open": read_all,
    "calibration": calibration,
    "inspect": inspected,
    "convert": converted,
    "quantize": quantized,
}
OF = {"full": ("quantize",), "shards": ("quantize",), "calibration": ("calibration",)}


def fault(error, path) -> str:
    """What is wrong with an exception, "" for one of ours that names the file."""
    kind, text = type(error), str(error)
    if not kind.__module__.startswith("comfyui_nibble") or not isinstance(error, (ValueError, OSError)):
        return f"unnamed: {kind.__name__}: {text[:200]}"
    if path.name not in text:
        return f"names no file: {kind.__name__}: {text[:200]}"
    if len(text) > MESSAGE + len(str(path)) or not text.replace("\n", "").isprintable():
        return f"too long, or control characters: {kind.__name__}: {text[:200]!r}"
    return ""


@contextmanager
def memory():
    """Gives a list, whose one entry then is how many MiB the block took at its most, above what there was
    before; 0 where Linux does not say."""
    grown = [0.0]
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no room for this one
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        yield grown
        return
    before = _status("VmRSS")
    yield grown
    grown[0] = (_status("VmHWM") - before) / 1024


def _status(name) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def outcome_of(stage, path, out) -> tuple[str, str]:
    """(what came of it in a word, what is wrong with that or "")."""
    try:
        STAGES[stage](path, out)
    except AssertionError as error:
        return "fault", str(error)
    except Exception as error:
        wrong = fault(error, path)
        return "fault" if wrong else type(error).__name__, wrong
    return "read", ""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return sound(tmp_path_factory.mktemp("sound"))


def test_sound_files_go_through_every_stage(made, tmp_path):
    for number, (kind, source) in enumerate(made.items()):
        path = tmp_path / f"m{number}{source.suffix}"
        shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
        for stage in ("open", "inspect", *OF.get(kind, ("convert",))):
            STAGES[stage](path, tmp_path / f"{kind}.out")


def test_damaged_files_are_errors_that_name_them(made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(atomic, "_flush", lambda _: None)
    torch.set_num_threads(1)
    count, first = size_of("NIBBLE_FUZZ", 300), size_of("NIBBLE_FUZZ_SEED", 1)
    kinds, outcomes, faults, slowest, largest = list(made), Counter(), [], (0.0, ""), (0.0, "")
    for seed in range(first, first + count):
        kind = kinds[seed % len(kinds)]
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        case = damaged(kind, made[kind], folder, seed)
        for stage in (
            "open",
            "inspect",
            *OF.get(kind, ("convert",)),
            *(("quantize",) if seed % 7 == 0 else ()),
        ):
            started = time.process_time()
            with memory() as grown:
                outcome, wrong = outcome_of(stage, case.path, folder / "out")
            seconds = time.process_time() - started
            outcomes[stage, outcome] += 1
            here = f"{stage} of {kind} {seed} ({case.what})"
            slowest, largest = max(slowest, (seconds, here)), max(largest, (grown[0], here))
            if seconds > SECONDS or grown[0] > MEGABYTES:
                wrong = wrong or f"{seconds:.1f} s of CPU, {grown[0]:.0f} MiB"
            if wrong:
                faults.append(f"{here}: {wrong}")
                print(faults[-1], flush=True)
        shutil.rmtree(folder)
    print(f"{count} files from {first} on, {sum(outcomes.values())} operations, {len(faults)} faults")
    for stage in STAGES:
        print(
            f"  {stage}: {', '.join(f'{n} {what}' for (s, what), n in outcomes.most_common() if s == stage)}"
        )
    print(f"  slowest {slowest[0]:.2f} s of CPU: {slowest[1][:200]}")
    print(f"  largest {largest[0]:.0f} MiB above what there was: {largest[1][:200]}")
    assert not faults


def test_the_files_that_are_read_stay_where_they_are(made):
    assert all(Path(path).exists() for path in made.values())
