"""Full-precision checkpoints, read lazily and presented under ComfyUI's key names."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from ..families import Family, UnknownArchitecture, detect
from ..families.fingerprint import fingerprint
from ..store.safe import CheckpointError, is_gguf, open_safetensors
from .blocks import Blocks, phrase_of
from .foreign import require_declarations, require_leaves
from .gguf_file import GGUFFile
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
        handle = GGUFFile(file) if is_gguf(file) else open_safetensors(file)
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
    """A model in floats of 64 to 8 bits, or in blocks of smaller ones: a safetensors file, a set of shards,
    a GGUF file or a diffusers folder; see `files_of`.

    shapes: {ComfyUI key: shape}. get(key): the tensor, memory-mapped where it is neither stacked from several
    nor below 16 bit, where it becomes bf16, nor fp64, which becomes fp32. origin: what the file says beside
    them. kinds: {format below 16 bit: weights in it}, of fp8, nvfp4, mxfp8, asym_w4a8_int8 and GGUF;
    reduced: a phrase on them, "" without any; saved: bytes that all such tensors take less than in 16 bit;
    below: their ComfyUI keys.

    Raises CheckpointError for files it cannot read, UnknownArchitecture for models it does not know.
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
        given = own, dtypes, self._raw
        declared = require_declarations(self.path, *given, metadata.get(HEADER), names.prefix)
        self._blocks = Blocks(self.path, declared, own, dtypes, self._raw)
        taken = self._blocks.beside.union(self._blocks.shapes)
        plain = {key: dtype for key, dtype in dtypes.items() if key not in taken}
        self._scales = Scales(self.path, {k: own[k] for k in plain}, plain, self._raw)
        ggml = {k: h.saved[key] for k, (h, key, _) in self._where.items() if key in getattr(h, "saved", ())}
        of_ggml = Counter(dtypes[name] for name in ggml)
        phrases = self._blocks.phrase, self._scales.phrase, phrase_of(of_ggml)
        self.reduced = ", ".join(filter(None, phrases))
        self.kinds = self._blocks.kinds + self._scales.kinds + of_ggml
        self.saved = self._blocks.saved + self._scales.values + sum(ggml.values())
        below = {*self._blocks.shapes, *self._scales.held, *ggml}
        for key in self._scales.keys | self._blocks.beside:
            del own[key]
        own |= self._blocks.shapes
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
        keys_of = lambda key: self._stacks[key].keys if key in self._stacks else (key,)
        self.below = {key for key in self.shapes if below.issuperset(keys_of(key))}

    def __reduce__(self):
        return Checkpoint, (self.path.absolute(),)  # pickled as its place: opened again where it is unpickled

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
        if name in self._blocks.shapes:
            return self._blocks.get(name)
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
