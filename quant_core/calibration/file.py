"""Statistics on disk: one safetensors file a pass. A calibration is a file or a folder of them, read
lazily."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from math import log2
from pathlib import Path

import torch

from ...kernels.operator.errors import NamedError
from ..layer.statistics import InputStatistics
from ..store import digests
from ..store.atomic import new_folder, require_room, save_tensors
from ..store.lock import only_run
from ..store.own_json import NotOurs
from ..store.progress import Progress, silent
from ..store.safe import CheckpointError, SafeFile, open_safetensors
from ..store.workers import HERE, Workers
from .header import VERSION, checked, require_tensors
from .plan import Input, plan_passes
from .trajectory import Call, Recorder, Trajectory

# Bytes of a file of merged statistics, which a task adds up. Passes are as large as the memory of a GPU
# allows, and so few: four for FLUX.2, of whose 128 shards each would read 950 GB.
PIECE = 256 << 20


class CalibrationError(NamedError):
    """A calibration file that is broken, incomplete, or belongs to another model."""


class NoCalibration(CalibrationError):
    """A sound file of something else."""


def save(path: Path, statistics: dict[str, InputStatistics], meta: dict, recorder: Recorder | None = None):
    """Writes the statistics of a pass under a temporary name, then renames. `meta` must hold "model" and
    "done"."""
    tensors: dict[str, torch.Tensor] = {}
    table = {}
    for name, s in statistics.items():
        s.mirror()
        table[name] = {"width": s.width, "blocks": s.blocks, "reservoir": s.reservoir, "count": s.count}
        tensors |= {
            f"{name}|absmax": s.absmax,
            f"{name}|tokens": s.tokens,
            f"{name}|keys": s.keys,
            f"{name}|timesteps": s.timesteps,
        }
        tensors |= {f"{name}|hessian.{a}": h for (a, _), h in s.hessians.items()}
    if recorder is not None and recorder.calls:
        meta = meta | {"trajectory": [asdict(call) for call in recorder.calls]}
        tensors |= {f"trajectory|{name}": t for name, t in recorder.tensors.items()}
    header = json.dumps(meta | {"version": VERSION, "inputs": table})
    save_tensors(
        Path(path), {k: t.cpu().contiguous() for k, t in tensors.items()}, {"nibble_calibration": header}
    )


def read_meta(path: Path) -> dict:
    """The header of one statistics file, whose tensors are there with the shapes and dtypes that it asks for.
    Raises CalibrationError naming the file, and the field or the tensor."""
    return _opened(Path(path))[1]


def _opened(path) -> tuple[SafeFile, dict]:
    try:
        file = open_safetensors(path)
    except CheckpointError as error:
        raise CalibrationError(
            f"calibration file {str(error).rstrip('.')}. Run the calibration again."
        ) from error
    header = (file.metadata() or {}).get("nibble_calibration")
    if header is None:
        raise NoCalibration(
            f"calibration file {path}: a safetensors file, but not statistics written by Nibble"
        )
    try:
        meta = checked(header)
        require_tensors(file, meta)
    except NotOurs as error:
        raise CalibrationError(f"calibration file {path}: {error}. Run the calibration again.") from error
    digests.require_description(path, file, CalibrationError)
    return file, meta


def read_statistics(path: Path, name: str, info: dict, second_moments: bool = True) -> InputStatistics:
    """The statistics of one input out of a file whose header `read_meta` has read; second_moments False
    leaves out 38 of its 44 MB at K = 3072. Raises CalibrationError naming the file and the tensor for NaN,
    Inf and negative maxima."""
    blocks = tuple(tuple(b) for b in info["blocks"])
    try:
        file = open_safetensors(path)
        get = lambda leaf: _finite(file, path, f"{name}|{leaf}", leaf == "absmax")
        hessians = {b: get(f"hessian.{b[0]}") for b in blocks} if info["count"] and second_moments else {}
        loose = (get("absmax"), hessians, get("tokens"), get("keys"), get("timesteps"))
    except CheckpointError as error:
        raise CalibrationError(
            f"calibration file {str(error).rstrip('.')}. Run the calibration again."
        ) from error
    for (start, _), hessian in hessians.items():
        if (hessian.diagonal() < 0).any():
            raise CalibrationError(
                f"calibration file {path}: {name}|hessian.{start}: negative squares. Run the calibration "
                "again."
            )
    return InputStatistics(name, info["width"], blocks, info["reservoir"], info["count"], *loose)


def _finite(file, path, key, positive) -> torch.Tensor:
    """aminmax takes 2.4 ms and no memory for the 38 MB of K = 3072, where isfinite takes 65 and 9 MB; the
    minimum of a NaN is a NaN."""
    tensor = file.get_tensor(key)
    if tensor.numel():
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()) or (positive and low < 0):
            found = "a negative number" if low < 0 and high.isfinite() and low.isfinite() else "NaN or Inf"
            raise CalibrationError(
                f"calibration file {path}: {key}: holds {found}, no statistics. Run the calibration again."
            )
    return tensor


def read_recorder(path: Path) -> Recorder:
    """The recorded calls of a statistics file, to go on with."""
    file, meta = _opened(Path(path))
    return Recorder(
        _calls(meta),
        {k.partition("|")[2]: file.get_tensor(k) for k in sorted(file.keys()) if k.startswith("trajectory|")},
    )


def _calls(meta) -> list[Call]:
    return [Call(**call) for call in meta.get("trajectory", [])]


class Calibration:
    """Opened statistics. `meta["model"]`: fingerprint of the model they came from; `hash`: of this
    calibration."""

    def __init__(self, path):
        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not files:
            raise CalibrationError(f"calibration folder {self.path}: holds no .safetensors file")
        metas = [read_meta(f) for f in files]
        self.files = files
        self.meta = {k: v for k, v in metas[0].items() if k not in ("inputs", "trajectory")}
        self._recorded = [
            (file, _calls(meta)) for file, meta in zip(files, metas, strict=True) if "trajectory" in meta
        ]
        for file, meta in zip(files, metas, strict=True):
            if meta["model"] != self.meta["model"]:
                raise CalibrationError(
                    f"calibration folder {self.path}: {file.name} belongs to model {meta['model']}, "
                    f"{files[0].name} to {self.meta['model']}"
                )
            if meta["done"] < meta["samples"]:
                raise CalibrationError(
                    f"calibration file {file}: stopped after {meta['done']} of {meta['samples']} samples. "
                    "Run it again to go on from there."
                )
        if len(files) != self.meta["passes"]:
            raise CalibrationError(
                f"calibration folder {self.path}: {len(files)} of {self.meta['passes']} passes. Run it "
                "again to go on from there."
            )
        self._where = {
            name: (file, info)
            for file, meta in zip(files, metas, strict=True)
            for name, info in meta["inputs"].items()
        }
        self.hash = hashlib.sha256(json.dumps(metas, sort_keys=True).encode()).hexdigest()[:16]

    def __reduce__(self):
        return Calibration, (
            self.path.absolute(),
        )  # pickled as its place: opened again where it is unpickled

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def inputs(self) -> list[Input]:
        """What it observed, from the headers; nothing says in which block."""
        return [
            Input(name, info["width"], tuple(tuple(b) for b in info["blocks"]), "")
            for name, (_, info) in self._where.items()
        ]

    def get(self, name: str, second_moments: bool = True) -> InputStatistics:
        """Statistics of one input, read now, with or without its Hessians. Raises CalibrationError where the
        input was not observed."""
        file, info = self._of(name)
        return read_statistics(file, name, info, second_moments)

    def width(self, name: str) -> int:
        """In-channels of one input, from the header. Raises as `get` does."""
        return self._of(name)[1]["width"]

    def _of(self, name):
        if name not in self._where:
            raise CalibrationError(
                f"calibration {self.path}: no statistics of layer {name}; it observed {len(self._where)} "
                "inputs"
            )
        return self._where[name]

    def trajectory(self) -> Trajectory | None:
        """The recorded inputs of the network; None where there are none (calibrations of 0.3.0 and before,
        merged ones)."""
        if not self._recorded:
            return None
        path, calls = self._recorded[0]

        ordered = sorted(calls, key=lambda call: (call.sample, call.step))
        return Trajectory(ordered, partial(_recorded_tensor, path.absolute()))  # which may be pickled

    def require_model(self, fingerprint: str):
        """Raises CalibrationError, naming both, where the calibration belongs to another model."""
        if self.meta["model"] != fingerprint:
            raise CalibrationError(
                f"calibration {self.path} was made with model {self.meta['model']}, this one is "
                f"{fingerprint}. "
                "Calibrate with the model that is to be quantized (a merged LoRA makes another model)."
            )


def _recorded_tensor(path, name) -> torch.Tensor:
    return open_safetensors(path).get_tensor(f"trajectory|{name}")


def merge(
    paths,
    out: Path,
    keep_calls: bool = False,
    workers: Workers = HERE,
    told: dict | None = None,
    progress: Progress = silent,
):
    """Merges complete calibrations of one model, made with other prompts or seeds, into the folder `out`, a
    file for each PIECE of statistics: no more is in memory than one of them has, as often as the number of
    calibrations has halves.

    keep_calls: take the network's recorded inputs of the first along; workers: who merges a piece; told: of
    the header beside. Sums are those of a tree over the paths in their order, whoever adds them. Raises
    CalibrationError where `out` holds anything already, or where the calibrations are of other models or
    layers.
    """
    calibrations, out = [Calibration(p) for p in paths], Path(out)
    first = calibrations[0]
    require_empty(out)
    for other in calibrations[1:]:
        other.require_model(first.meta["model"])
        if set(other.names) != set(first.names):
            raise CalibrationError(f"calibrations {first.path} and {other.path} observed different layers")
    require_room(out, sum(f.stat().st_size for f in first.files))
    total = sum(c.meta["samples"] for c in calibrations)
    pieces = plan_passes(first.inputs(), PIECE)
    plan = [[i.name for i in piece] for piece in pieces]
    meta = (
        first.meta
        | {"samples": total, "done": total, "merged_from": [c.hash for c in calibrations]}
        | {"passes": len(plan), "plan": plan}
        | (told or {})
    )
    with (
        only_run(out, "merges calibrations"),
        new_folder(out) as part,  # some pieces of a merged calibration are none
    ):
        unit = OnePiece(calibrations, part.absolute(), meta, keep_calls)
        sizes = [sum(InputStatistics.nbytes(i.width, i.blocks) for i in piece) for piece in pieces]
        # The recorded inputs go with the first, and are at most what its file has.
        sizes[0] += first.files[0].stat().st_size if keep_calls else 0
        memory = lambda item: round(sizes[item[0]] * (2 + log2(len(calibrations))))
        name = lambda item: f"merge {out.name}, {item[1][0]}"
        for _ in progress(workers.map(unit, list(enumerate(plan)), name, memory), len(plan)):
            pass


@dataclass(frozen=True)
class OnePiece:
    """Merges a piece, (its number, the names of its inputs), into its file."""

    calibrations: list[Calibration]
    folder: Path
    meta: dict
    keep_calls: bool

    def __call__(self, item: tuple[int, list[str]]) -> int:
        index, names = item
        recorder = None
        if self.keep_calls and index == 0:
            recorder = read_recorder(self.calibrations[0].files[0])
        merged = {name: _sum([c.get for c in self.calibrations], name) for name in names}
        save(self.folder / f"pass-{index:03d}.safetensors", merged, self.meta, recorder)
        return index


def _sum(readers, name) -> InputStatistics:
    """The statistics of an input over calibrations, halves first."""
    if len(readers) == 1:
        return readers[0](name)
    middle = (len(readers) + 1) // 2
    found = _sum(readers[:middle], name)
    found.merge(_sum(readers[middle:], name))
    return found


def require_empty(out: Path):
    """Raises CalibrationError where something is at `out` that is no empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CalibrationError(
            f"{out}: is there already. Name a new folder for the merged calibration; nothing is written over."
        )
