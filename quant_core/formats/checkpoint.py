"""Full-precision checkpoints, read lazily and presented under ComfyUI's key names."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..calibration.file import fingerprint
from ..families import detect
from .errors import CheckpointError
from .scaled import Scales
from .shards import files_of

PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def prefix_of(keys) -> str:
    """What the diffusion model's keys begin with in a whole checkpoint; "" in a file of its own."""
    return next((p for p in PREFIXES if any(k.startswith(p) for k in keys)), "")


def open_safetensors(path: Path):
    """safe_open with errors that name the file and say what it seems to be. Pickles are never opened."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not found")
    with open(path, "rb") as f:
        start = f.read(16)
    # A safetensors file starts with the length of its header, which may look like anything, then the header's brace.
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise CheckpointError(f"{path}: a pickled PyTorch file, which can run code when opened. Convert it to safetensors first.")
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{path}: a GGUF file, already quantized. Start from the bf16 safetensors file.")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path}: not a whole safetensors file of {size} bytes ({error}). Download or save it again.") from error


class Checkpoint:
    """A model in 32, 16 or 8-bit floats: a safetensors file, a set of shards, or a diffusers folder; see `files_of`.

    shapes: {ComfyUI key: shape}. get(key): the tensor, memory-mapped where it is neither stacked from several nor scaled fp8, which becomes
    bf16. Raises CheckpointError for files it cannot read, UnknownArchitecture for models it does not know.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files = files_of(self.path)
        self._where, own, dtypes = {}, {}, {}
        for file in self.files:
            handle = open_safetensors(file)
            keys = list(handle.keys())
            prefix = prefix_of(keys)
            for key in keys:
                if key.startswith(prefix):
                    name, piece = key.removeprefix(prefix), handle.get_slice(key)
                    if name in self._where:
                        raise CheckpointError(
                            f"{self.path}: {name} is in {self._where[name][2].name} and in {file.name}. Leave one version of the model in the folder."
                        )
                    own[name], dtypes[name] = tuple(piece.get_shape()), piece.get_dtype()
                    self._where[name] = (handle, key, file)
        self._scales = Scales(self.path, own, dtypes, self._raw)
        for key in self._scales.keys:
            del own[key]
        self.family = detect(own)
        self._stacks = {} if self.family.matches(own) else self.family.diffusers(own)
        if self._stacks:
            self.shapes = {k: (sum(own[o][0] for o in s.keys), *own[s.keys[0]][1:]) for k, s in self._stacks.items()}
        else:
            self.shapes = own

    def get(self, key: str) -> torch.Tensor:
        """The tensor under ComfyUI's name `key`."""
        return self._stacks[key].read(self._read) if key in self._stacks else self._read(key)

    def _raw(self, name):
        handle, key, _ = self._where[name]
        return handle.get_tensor(key)

    def _read(self, name):
        return self._scales.apply(name, self._raw(name))

    def fingerprint(self) -> str:
        """What calibrations are tied to; the same for ComfyUI's and diffusers' names of one model."""
        return fingerprint(self.family.layers(self.shapes), self.get)

    def sha256(self) -> str:
        """Of the files, for provenance; about 1 GB/s."""
        digest = hashlib.sha256()
        for file in self.files:
            with open(file, "rb") as f:
                while chunk := f.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()
