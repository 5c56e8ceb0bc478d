"""Statistics on disk: one safetensors file a pass. A calibration is a file or a folder of them, read
lazily."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ...kernels.operator.errors import NamedError
from ..layer.statistics import InputStatistics
from ..store import digests
from ..store.atomic import new_folder, require_room, save_tensors
from ..store.lock import only_run
from ..store.own_json import NotOurs
from ..store.safe import CheckpointError, SafeFile, open_safetensors
from .header import VERSION, checked, require_tensors
from .trajectory import Call, Recorder, Trajectory


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

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def passes(self) -> list[list[str]]:
        """Names by the file that they are in."""
        files: dict[Path, list[str]] = {}
        for name, (file, _) in self._where.items():
            files.setdefault(file, []).append(name)
        return list(files.values())

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

        def get(name):
            return open_safetensors(path).get_tensor(f"trajectory|{name}")

        return Trajectory(sorted(calls, key=lambda call: (call.sample, call.step)), get)

    def require_model(self, fingerprint: str):
        """Raises CalibrationError, naming both, where the calibration belongs to another model."""
        if self.meta["model"] != fingerprint:
            raise CalibrationError(
                f"calibration {self.path} was made with model {self.meta['model']}, this one is "
                f"{fingerprint}. "
                "Calibrate with the model that is to be quantized (a merged LoRA makes another model)."
            )


def merge(paths, out: Path):
    """Merges complete calibrations of one model, made with other prompts or seeds, into the folder `out`, a
    file for each pass of the first: no more is in memory than one of its passes had. Raises CalibrationError
    where `out` holds anything already."""
    calibrations, out = [Calibration(p) for p in paths], Path(out)
    require_empty(out)
    for other in calibrations[1:]:
        other.require_model(calibrations[0].meta["model"])
        if set(other.names) != set(calibrations[0].names):
            raise CalibrationError(
                f"calibrations {calibrations[0].path} and {other.path} observed different layers"
            )
    require_room(out, sum(f.stat().st_size for f in calibrations[0].files))
    total = sum(c.meta["samples"] for c in calibrations)
    meta = calibrations[0].meta | {
        "samples": total,
        "done": total,
        "merged_from": [c.hash for c in calibrations],
    }
    # Some passes of a merged calibration are none.
    with (
        only_run(out, "merges calibrations"),
        new_folder(out) as part,
    ):
        for index, names in enumerate(calibrations[0].passes()):
            merged = {name: calibrations[0].get(name) for name in names}
            for name, statistics in merged.items():
                for other in calibrations[1:]:
                    statistics.merge(other.get(name))
            save(part / f"pass-{index:03d}.safetensors", merged, meta)


def require_empty(out: Path):
    """Raises CalibrationError where something is at `out` that is no empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CalibrationError(
            f"{out}: is there already. Name a new folder for the merged calibration; nothing is written over."
        )
