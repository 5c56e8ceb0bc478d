"""Full-precision checkpoints, read lazily and presented under ComfyUI's key names."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from ..families import Family, UnknownArchitecture, detect
from ..families.fingerprint import fingerprint
from ..store.safe import CheckpointError, open_safetensors
from .foreign import require_declarations, require_leaves
from .kitchen.declared import HEADER
from .origin import Origin, is_beside, names_text, outside, size
from .pipeline_folder import configurations, origin_of
from .prefixes import Names, network
from .scaled import Scales
from .shards import files_of


def open_files(files: Iterable[Path], path: Path) -> tuple[dict, dict[str, str]]:
    """({key: (handle, file)}, header entries) of the files of the model at `path`. Raises CheckpointError
    where two have a tensor of one name."""
    where: dict[str, tuple] = {}
    metadata: dict[str, str] = {}
    for file in files:
        handle = open_safetensors(file)
        metadata |= handle.metadata() or {}
        for key in list(handle.keys()):
            if key in where:
                raise CheckpointError(
                    f"{path}: {key} is in {where[key][1].name} and in {file.name}. Leave one version of "
                    "the model in the folder."
                )
            where[key] = handle, file
    return where, metadata


def family_of(shapes, path: Path) -> Family:
    """`detect`, whose error names the file."""
    try:
        return detect(shapes)
    except UnknownArchitecture as error:
        raise UnknownArchitecture(f"{path}: {error}") from error


class Checkpoint:
    """A model in floats of 64 to 8 bits: a safetensors file, a set of shards, or a diffusers folder; see
    `files_of`.

    shapes: {ComfyUI key: shape}. get(key): the tensor, memory-mapped where it is neither stacked from several
    nor fp8, which becomes bf16, nor fp64, which becomes fp32. origin: what the file says beside them. fp8: a
    phrase on the weights that the file has in fp8, "" without any; fp8_values: how many numbers those and all
    other tensors in fp8 are. Raises CheckpointError for files it cannot read, UnknownArchitecture for models
    it does not know.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files = files_of(self.path)
        where, metadata = open_files(self.files, self.path)
        try:
            names = network(where, str(self.path))
        except CheckpointError:  # where a foreign format has other names than `weight`, that is what to say
            self._require_known({key: (handle, key) for key, (handle, _) in where.items()}, metadata)
            raise
        self._where = {name: (where[key][0], key, where[key][1]) for name, key in names.keys.items()}
        own, dtypes = self._require_known(self._where, metadata)
        require_declarations(self.path, own, dtypes, self._raw, metadata.get(HEADER), names.prefix)
        self._scales = Scales(self.path, own, dtypes, self._raw)
        self.fp8, self.fp8_values = self._scales.phrase, self._scales.values
        for key in self._scales.keys:
            del own[key]
        self.origin = self._origin(names, where, own, metadata)
        self.family = family_of(own, self.path)
        self._stacks = {} if self.family.matches(own) else self.family.diffusers(own)
        if self._stacks:
            self._require_all(own)
            self.shapes = {
                k: (sum(own[o][0] for o in s.keys), *own[s.keys[0]][1:]) for k, s in self._stacks.items()
            }
        else:
            self.shapes = own

    @property
    def inputs(self) -> list[Path]:
        """Every file that is read of the model, or says in its folder what it is: nothing is written over
        them."""
        said = configurations(self.files[0].parent)
        if self.path.is_dir():
            said += [*self.path.glob("*.json"), *self.path.glob("*/*.json")]
        return [*self.files, *(path for path in said if path.is_file())]

    def _require_known(self, where, metadata):
        """({name: shape}, {name: dtype}) of tensors that are in no foreign format. where: {name: (handle,
        key, ...)}."""
        pieces = {name: handle.get_slice(key) for name, (handle, key, *_) in where.items()}
        shapes, dtypes = (
            {n: tuple(p.get_shape()) for n, p in pieces.items()},
            {n: p.get_dtype() for n, p in pieces.items()},
        )
        require_leaves(self.path, shapes, dtypes, metadata.get(HEADER))
        return shapes, dtypes

    def _origin(self, names: Names, where, own, metadata) -> Origin:
        """Takes tensors that are no part of the network out of `own`."""
        kept, dropped = outside({key: size(where[key][0].get_slice(key)) for key in names.outside})
        beside = {key: where[key][0].get_tensor(key) for key in kept}
        for name in [name for name in own if is_beside(name)]:
            del own[name]
            beside[name] = self._raw(name)
        folder, header = origin_of(self.files[0].parent), Origin.of_header(metadata)
        return Origin(
            metadata={**folder.metadata, **header.metadata},
            beside={**folder.beside, **beside},
            dropped=(*header.dropped, *dropped),
        )

    def _require_all(self, own):
        if lost := set(own) - {key for stack in self._stacks.values() for key in stack.keys}:
            raise CheckpointError(
                f"{self.path}: {len(lost)} tensors of a {self.family.title} model in diffusers' names have "
                "no place in ComfyUI's: "
                f"{names_text(lost)}. The model would come out without them. Take the file made for ComfyUI."
            )

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
        return fingerprint(self.family.mapped(self.shapes), self.get)

    def sha256(self) -> str:
        """Of the files, for provenance; about 1 GB/s."""
        digest = hashlib.sha256()
        for file in self.files:
            with open(file, "rb") as f:
                while chunk := f.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()
