"""Files that are whole or not there."""

import os
from pathlib import Path

from safetensors.torch import save_file


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str]):
    """safetensors' save_file under a temporary name in the same folder, flushed to disk, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
