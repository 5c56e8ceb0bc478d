"""Where a quantized model came from."""

from dataclasses import asdict
from importlib import metadata

import torch

VERSION = "0.9.0"


def provenance(fingerprint: str, method: str, config, calibration, source: dict | None = None) -> dict:
    """JSON for the header of a file. source: {"file", "sha256"} where the model came straight from a file."""
    return {
        "model": fingerprint,
        "source": source or {},
        "method": method,
        "settings": asdict(config),
        "calibration": None
        if calibration is None
        else {
            "hash": calibration.hash,
            "samples": calibration.meta["samples"],
            "seed": calibration.meta["seed"],
        },
        "nibble": VERSION,
        "torch": str(torch.__version__),
        "safetensors": metadata.version("safetensors"),
    }


def origins(provenance: dict) -> set[str]:
    """Fingerprints of the models that a quantized model comes from; Nibble Swap Blocks joins two of them.
    Other formats than the pack's own name none."""
    found = {provenance["model"]} if provenance.get("model") else set()
    return found.union(*(origins(provenance[side]) for side in ("a", "b") if side in provenance))
