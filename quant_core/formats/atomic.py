"""Files that are whole or not there."""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors.torch import save_file


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str]):
    """safetensors' save_file under a temporary name in the same folder, flushed to disk, then renamed."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def save_text(path: Path, text: str):
    """The same for text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_writable(path: Path):
    """Raises OSError naming `path` where no file can be put; to be called before the work whose result goes there."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder. Name the file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error}). Choose another place.") from error


@contextmanager
def replacing(path: Path):
    """Gives a temporary path in the same folder, whose file takes the place of `path` if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
