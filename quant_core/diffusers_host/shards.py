"""A calibration in shards of a few samples each, gathered wherever somebody runs them, and merged."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from ..calibration.file import Calibration, CalibrationError, merge
from ..calibration.plan import inputs_of, statistics_bytes
from ..calibration.prompts import default_prompts
from ..formats.checkpoint import Checkpoint
from ..formats.pipeline_folder import require_safetensors
from ..store.atomic import require_folder, require_free
from ..store.lock import only_run
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from .model import named
from .pipeline import calibrate_with, load_pipeline, pipeline_bytes

SHARD = 4  # samples: the fewest of which one is held out
MOST = 128  # shards: the statistics of each lie on the disk until the last is there
SHARDS = "shards"  # what a folder of unfinished shards ends in


def calibrate_in_shards(
    pipeline: Path,
    folder: Path,
    prompts: list[str] | None,
    *,
    samples: int,
    steps: int,
    size: int | None,
    seed: int,
    memory: int,
    device: str,
    progress: Progress = silent,
    say: Callable[[str], None] = logging.info,
    workers: Workers = HERE,
) -> Calibration:
    """As `calibrate_pipeline`, `shard_of` samples a task, whose statistics are added as a tree in their
    order: the same bytes whoever `workers` are. Those of `calibrate_pipeline` are other sums of the same
    samples, and keep other tokens.

    Finished shards stay in `<folder>.shards` until they are merged; a stopped run goes on with them. Recorded
    inputs of the network are those of the first shard. Raises the errors of `calibrate_pipeline`,
    CalibrationError where `folder` holds something else, and NoRoom where the disk does not hold all shards.
    """
    pipeline, folder = Path(pipeline).absolute(), Path(folder).absolute()
    if prompts is None:
        prompts = _classes(pipeline, samples) or default_prompts()
    asked = {"samples": samples, "steps": steps, "size": size, "seed": seed}
    settings = asked | {"prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
    require_safetensors(pipeline)
    require_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        found = Calibration(folder)
        if found.meta.get("sharded") == settings:
            return found
        raise CalibrationError(f"{folder}: holds another calibration. Name another folder, or move it.")
    left = folder.with_name(f"{folder.name}.{SHARDS}")
    with only_run(left, "calibrates in shards"):
        unit = OneShard(pipeline, left, prompts, samples, steps, size, seed, memory, device)
        size_of = shard_of(samples)
        firsts = list(range(0, samples, size_of))
        _require_disk(pipeline, left, sum(not unit.place(first).exists() for first in firsts))
        needs = memory + pipeline_bytes(pipeline, device)
        name = lambda first: (
            f"calibrate {pipeline.name}, samples {first} to {min(first + size_of, samples) - 1}"
        )
        for _ in progress(workers.map(unit, firsts, name, lambda first: needs), len(firsts)):
            pass
        say("Nibble: all shards are there; they are merged")
        parts = [unit.place(first) for first in firsts]
        told = {"sharded": settings}
        merge(parts, folder, keep_calls=True, workers=workers, told=told, progress=progress)
        for part in parts:
            for file in Calibration(part).files:
                file.unlink()
            part.rmdir()
        left.rmdir()
    return Calibration(folder)


def _require_disk(pipeline, left, missing):
    """Raises NoRoom where the shards that are still missing, and the sum of all, do not fit on the disk."""
    checkpoint = Checkpoint(pipeline)
    each = statistics_bytes(inputs_of(checkpoint.family.layers(checkpoint.shapes)))
    require_free(left / SHARDS, (missing + 1) * each)


def shard_of(samples: int) -> int:
    """Samples of a shard: of many samples shards are longer, not more than MOST. Follows from the samples
    alone, so that the sums are the same whoever adds them."""
    return max(SHARD, ceil(samples / MOST))


@dataclass
class OneShard:
    """Calibrates on `shard_of` samples from the first on; gives its number. The pipeline is loaded once in
    each process."""

    pipeline: Path
    folder: Path
    prompts: list[str]
    samples: int
    steps: int
    size: int | None
    seed: int
    memory: int
    device: str
    _pipe: Any = None

    def place(self, first: int) -> Path:
        return self.folder / f"shard-{first // shard_of(self.samples):05d}"

    def __call__(self, first: int) -> int:
        if self._pipe is None:
            self._pipe = load_pipeline(self.pipeline, self.device)
        count = min(shard_of(self.samples), self.samples - first)
        prompts = [self.prompts[(first + i) % len(self.prompts)] for i in range(count)]
        with named(self.pipeline, but=self.folder):
            calibrate_with(
                self._pipe,
                self.place(first),
                prompts,
                samples=count,
                steps=self.steps,
                size=self.size,
                seed=self.seed + first,
                memory=self.memory,
            )
        return first


def _classes(pipeline, samples) -> list[str] | None:
    """Ids evenly over the classes of a model that takes classes."""
    try:
        config = json.loads((pipeline / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    count = (
        config.get("num_embeds_ada_norm") if config.get("_class_name") == "DiTTransformer2DModel" else None
    )
    return None if not count else [str(i * count // samples) for i in range(samples)]
