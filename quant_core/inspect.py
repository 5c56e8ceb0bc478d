"""What a file is and holds, from its header alone."""

from pathlib import Path

import torch

from ..kernels import paths_of
from ..kernels.target import target_of
from .calibration.file import Calibration
from .formats.checkpoint import Checkpoint, CheckpointError, open_safetensors
from .formats.pack import PackFile
from .report import file_storage


def describe(path: Path) -> dict:
    """A JSON-able description of a Nibble file, a calibration (file or folder) or a full-precision checkpoint.

    Raises CheckpointError, CalibrationError or UnknownArchitecture, each naming the file.
    """
    path = Path(path)
    first = path
    if path.is_dir():
        first = next(iter(sorted(path.glob("*.safetensors"))), None)
        if first is None:
            raise CheckpointError(f"{path}: a folder without .safetensors files")
    metadata = open_safetensors(first).metadata() or {}
    if "nibble_calibration" in metadata:
        calibration = Calibration(path)
        return {"kind": "calibration", "hash": calibration.hash, "inputs": len(calibration.names)} | calibration.meta
    if "nibble" in metadata:
        return _packed(PackFile(path))
    checkpoint = Checkpoint(path)
    layers = checkpoint.family.layers(checkpoint.shapes)
    return {
        "kind": "full-precision checkpoint",
        "family": checkpoint.family.title,
        "model": checkpoint.fingerprint(),
        "tensors": len(checkpoint.shapes),
        "blocks": len({layer.block for layer in layers}),
        "quantizable layers": len(layers),
    }


def _packed(pack: PackFile) -> dict:
    weights = sum(s.in_features * s.out_features for s in pack.specs.values())
    block_bytes = sum(row["nbytes"] for row in pack.report)
    return {
        "kind": "Nibble model",
        "family": pack.family,
        "file bytes": pack.path.stat().st_size,
        "quantized layers": len(pack.specs),
        "block bits per weight": round(8 * block_bytes / max(1, weights), 3),
        "storage": file_storage(pack),
        "left in 16 bit": [row["name"] for row in pack.report if not row["nbytes"]],
        "provenance": pack.provenance,
        "runs on this machine": paths_of(pack.specs, target_of("cuda" if torch.cuda.is_available() else "cpu"))[1],
        "layers": {row["name"]: row["what"] + (f", {row['sqnr_db']:.1f} dB" if row["sqnr_db"] is not None else "") for row in pack.report},
    }
