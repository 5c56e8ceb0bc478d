"""A whole model quantized: what a command and a node do alike, from the checks to the finished layers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..calibration.file import Calibration
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..layer.row import Row
from ..methods import Method
from ..store.lock import only_run
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from ..training.presets import UNTRAINED, Preset
from ..training.trainer import Trainer, require_chain, require_trajectory
from .layers import leave_out, require_statistics
from .source import Source
from .stages import finished, quantize_blocks, steps_of
from .unfinished import Unfinished
from .unquantized import kept_rows


@dataclass(frozen=True)
class Finished:
    """layers: {name: quantized, memory-mapped from files that are there until the context ends}. rows: of the
    report, those of what stays in 16 bit among them. kept: a line on what a stopped run had left, or ""."""

    layers: dict[str, QuantizedLayer]
    rows: list[Row]
    kept: str


@dataclass(frozen=True)
class Job:
    """What is quantized, and how.

    plan: the layers of `source` to quantize, as `calibration.observe.measured` gives them. settings: of the
    run, as `provenance` makes them; those of a training are added. left: rows of layers that are not in the
    plan and have a reason of their own.
    """

    source: Source
    plan: list[Layer]
    method: Method
    config: object
    calibration: Calibration | None
    settings: dict
    device: str | torch.device = "cpu"
    preset: Preset = UNTRAINED
    left: tuple[Row, ...] = ()

    def __post_init__(self):
        require_statistics(self.plan, self.calibration)
        if self.trained:
            require_trajectory(self.calibration)
            require_chain(self.source.family, self.plan)
            self.settings["training"] = asdict(self.preset)

    @property
    def trained(self) -> bool:
        return self.preset != UNTRAINED


@contextmanager
def quantized(
    job: Job,
    folder: Path,
    *,
    lock: Path | None = None,
    doing: str = "",
    trainer: Callable[[Path], Trainer] | None = None,
    begin: Callable[[Unfinished], object] = lambda store: None,
    working: Callable[[], AbstractContextManager] = nullcontext,
    progress: Progress = silent,
    keep: bool = False,
    workers: Workers = HERE,
) -> Iterator[Finished]:
    """Quantizes a model and yields it; `folder` keeps what is finished until the context ends without an
    error, or, with `keep`, for longer.

    lock: what no other run may work on, `folder` if not given; doing: what the other is told.
    trainer(folder): called where the job trains. begin(store): called before the work, for checks and
    messages. working(): a context around the work. workers: who fits layers, each into
    `folder`. Raises Busy, the errors of Unfinished and of a Job before anything is computed, those of
    `quantize_layers` and of Trainer later. Host memory: one layer in full precision at a time, a block where
    it trains.
    """
    with only_run(lock or folder, doing or f"quantizes with {job.method.name}"):
        store = Unfinished(folder, job.source.family.name, job.settings)
        begin(store)
        trains = trainer(store.folder) if job.trained and trainer else None
        work = quantize_blocks(
            job.plan,
            job.source,
            job.method,
            job.config,
            job.calibration,
            job.device,
            store,
            job.preset,
            trains,
            workers,
        )
        with working():
            for _ in progress(work, steps_of(job.plan, job.preset)):
                pass
        layers, rows = finished(job.plan, job.preset, store)
        leave_out(layers, rows, job.plan)
        rows += job.left
        rows += kept_rows(job.source.shapes, job.source.family, rows, job.calibration)
        yield Finished(layers, rows, store.text if store.kept else "")
        if not keep:
            store.remove()
