"""`nibble quantize`: a checkpoint file in, a Nibble file out, block by block; a killed run goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from .calibration.file import Calibration
from .formats import pack
from .formats.checkpoint import Checkpoint
from .formats.provenance import provenance
from .methods import Method
from .quantize import quantize_layers
from .report import Row


def quantize_file(
    source: Path,
    destination: Path,
    method: Method,
    config,
    calibration: Calibration | None = None,
    device: str = "cpu",
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> list[Row]:
    """Quantizes `source` into `destination` and returns the rows of the report.

    Each finished block is kept in `<destination>.partial/` until the whole is written. Host memory: one layer at a time
    (1.3 GB above the page cache for a 12B FLUX with ConvRot); source and finished blocks stay memory-mapped. Raises the errors of Checkpoint, Calibration and
    quantize_layers.
    """
    checkpoint = Checkpoint(source)
    fingerprint = checkpoint.fingerprint()
    if calibration is not None:
        calibration.require_model(fingerprint)
    settings = provenance(fingerprint, method.name, config, calibration)
    partial = _partial_folder(destination, settings)
    layers = checkpoint.family.layers(checkpoint.shapes)
    blocks = [(name, list(group)) for name, group in groupby(layers, key=lambda layer: layer.block)]
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(checkpoint.sha256)
        for name, members in progress(blocks, len(blocks)):
            path = partial / f"{name}.safetensors"
            if path.exists():
                continue
            done = list(quantize_layers(members, checkpoint.get, checkpoint.shapes, method, config, calibration, device))
            quantized = {layer.name: layer for layer, _ in done if layer is not None}
            pack.save(path, quantized, {}, checkpoint.family.name, settings, [row.to_json() for _, row in done])
        settings["source"] = {"file": checkpoint.path.name, "sha256": digest.result()}
    files = [pack.PackFile(partial / f"{name}.safetensors") for name, _ in blocks]
    quantized = {name: f.layer(name) for f in files for name in f.specs}
    report = [row for f in files for row in f.report]
    rest = {k: checkpoint.get(k) for k in checkpoint.shapes if k.rpartition(".")[0] not in quantized}
    pack.save(destination, quantized, rest, checkpoint.family.name, settings, report)
    shutil.rmtree(partial)
    return [Row(**row) for row in report]


def _partial_folder(destination, settings) -> Path:
    """The folder of finished blocks; emptied where it belongs to a run with other settings."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = Path(f"{destination}.partial")
    marker = folder / "settings.sha256"
    if folder.exists() and not (marker.exists() and marker.read_text() == key):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(key)
    return folder
