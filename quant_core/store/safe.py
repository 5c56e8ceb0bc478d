"""safetensors files, opened with care: what they are is said before they are parsed, what reading raises
names the file and the tensor."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.operator.errors import NamedError, shortened

# FLUX's header has 0.1 MB, its Nibble file's 1.5 MB; a mixture of experts with 6000 layers would come to 11.
# safetensors allows 100 MB.
LONGEST = 32 * 2**20
MEMORY = 180 * 10**6  # bytes that parsing a header may take
GGUF = (
    "a GGUF file. Unet Loader (GGUF) of ComfyUI-GGUF loads it; `nibble quantize` takes it as a source, the "
    "bf16 safetensors file is the better one"
)


class CheckpointError(NamedError):
    """A file that is not a readable safetensors checkpoint, or not a sound one of its kind."""


class SafeFile:
    """What safe_open gives, of the file at `path`. Raises CheckpointError naming the file, and the tensor
    where it is one."""

    def __init__(self, path: Path):
        self.path = path
        self._metadata: tuple[dict[str, str] | None] | None = None
        try:
            self._file = safe_open(path, "pt")
            self._keys = list(self._file.keys())
        except (SafetensorError, UnicodeError) as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path}: not a whole safetensors file of {size} bytes ({error}). Download or save it again."
            ) from error

    def keys(self) -> list[str]:
        return self._keys

    def metadata(self) -> dict[str, str] | None:
        """The header's own entries. Made once: 200,000 of them take safetensors 0.9 s a time."""
        if self._metadata is None:
            self._metadata = (self._file.metadata(),)
        found = self._metadata[0]
        return None if found is None else dict(found)

    def get_slice(self, key: str):
        return self._of(key, self._file.get_slice)

    def get_tensor(self, key: str) -> torch.Tensor:
        return self._of(key, self._file.get_tensor)

    def _of(self, key, read):
        try:
            return read(key)
        # safetensors knows dtypes that this PyTorch may not have, and PyTorch refuses some shapes that it
        # takes.
        except (SafetensorError, AttributeError, RuntimeError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.path}: {key}: cannot be read ({shortened(str(error))}). Download or save it again."
            ) from error


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def open_safetensors(path: Path) -> SafeFile:
    """The safetensors file at `path`. Raises CheckpointError naming it, and saying what it seems to be.
    Pickles are never opened."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not found")
    if is_gguf(path):
        raise CheckpointError(f"{path}: {GGUF}.")
    with open(path, "rb") as f:
        start = f.read(16)
        # A safetensors file starts with the length of its header, which may look like anything, then the
        # header's brace.
        if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise CheckpointError(
                f"{path}: a pickled PyTorch file, which can run code when opened. Convert it to "
                "safetensors first."
            )
        f.seek(8)
        _require_small(path, int.from_bytes(start[:8], "little"), f)
    return SafeFile(path)


def _require_small(path, length, file):
    """safetensors takes 25 times the size of a header that is made for it, so what it would take is counted
    first."""
    size = path.stat().st_size
    if 8 + length > size:  # no safetensors file: safetensors says so better
        return
    if length > LONGEST:
        raise CheckpointError(
            f"{path}: its header has {length} bytes, expected at most {LONGEST}. It is no model, or is "
            "damaged: download or save it again."
        )
    header = file.read(length)
    require_little_memory(path, header, "header")


def require_little_memory(path: Path, text: bytes, what: str):
    """Raises CheckpointError for JSON that would take over MEMORY bytes to parse; what: it is of the file."""
    # Measured with safetensors 0.8: texts and the tables that hold them, numbers and lists, and the copies of
    # a long text. Python's own parser takes less.
    memory = 100 * text.count(b'"') + 40 * sum(map(text.count, (b",", b"[", b"{"))) + 4 * len(text)
    if memory > MEMORY:
        raise CheckpointError(
            f"{path}: its {what} of {len(text)} bytes would take {memory / 1e6:.0f} MB to read, expected at "
            f"most {MEMORY / 1e6:.0f}. It is no "
            "model, or is damaged: download or save it again."
        )
