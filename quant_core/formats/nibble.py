"""The pack's own file: one safetensors file with packed layers, the untouched rest, and a JSON description in
its header.

Metadata key "nibble": {"version", "family", "layers": {name: LinearSpec}, "provenance", "report"}. Tensor
keys are ComfyUI's module names with the suffixes that LinearSpec lists. Version 2 has "base3" beside: names
of layers whose `weight` holds the trits of all in-channels of a row five a byte, uint8 (N, ceil(K / 5)), and
not as in memory, four a byte. Version 3 has "origin" (see `origin`), whose tensors are there as
"nibble_beside.<name>", and tensors that stop ComfyUI's own loader (see `stop`). Version 4 is written where
a layer is on a grid of its own (nvfp4), so that versions of the pack before it say to update.
"""

import json
from pathlib import Path

import torch

from ...kernels.operator.codes import INT
from ...kernels.operator.packing import TRITS, pack, pack_base3, unpack, unpack_base3
from ...kernels.operator.spec import TENSOR_NAMES, SpecError
from ..families import UnknownArchitecture, by_name
from ..layer.linear import QuantizedLayer
from ..layer.row import Row
from ..store import digests, own_json
from ..store.atomic import save_tensors
from ..store.own_json import NotOurs
from ..store.safe import CheckpointError, open_safetensors
from . import spec_json, stop
from .opened import Opened
from .origin import Origin

VERSION = 4  # 3 had no grids; 2, up to 0.5, no origin; 1, up to 0.3, no base 3 either
BESIDE = "nibble_beside."
_LEAVES = frozenset(TENSOR_NAMES) - {"weight", "bias", "transform"}  # of quantized layers alone


class PackError(CheckpointError):
    """A file that claims to be a Nibble model and is not a sound one."""


def save(
    path,
    layers: dict[str, QuantizedLayer],
    rest: dict[str, torch.Tensor],
    family: str,
    provenance: dict,
    report: list,
    base3: bool = False,
    origin: Origin | None = None,
):
    """Writes a model under a temporary name and renames it. rest: {key: tensor} of all that is not quantized;
    origin: what its source said beside them.

    base3: ternary layers take 1.6 instead of 2 bits a code in the file; the same codes are read from it.
    """
    tensors = {f"{name}.{leaf}": t for name, layer in layers.items() for leaf, t in layer.tensors.items()}
    if both := set(tensors) & set(rest):
        raise ValueError(f"tensors given twice, as part of a quantized layer and apart: {sorted(both)[:3]}")
    trits = {}
    for name, layer in layers.items() if base3 else ():
        if all(p.weight.bits == 2 for p in layer.spec.parts):
            codes = unpack(layer.tensors["weight"].cpu(), 2)
            if codes.min() > -2:
                trits[name] = pack_base3(codes)
    tensors |= {f"{name}.weight": packed for name, packed in trits.items()}
    origin = origin or Origin()
    tensors |= {f"{BESIDE}{name}": t for name, t in origin.beside.items()} | stop.tensors()
    header = {
        "version": VERSION if any(layer.spec.grid != INT for layer in layers.values()) else 3,
        "family": family,
        "layers": {name: spec_json.to_json(layer.spec) for name, layer in layers.items()},
        "provenance": provenance,
        "report": report,
        "origin": origin.to_json(),
    } | ({"base3": list(trits)} if trits else {})
    everything = {k: t.detach().cpu().contiguous() for k, t in (tensors | rest).items()}
    save_tensors(Path(path), everything, {"format": "pt", "nibble": json.dumps(header)})


class PackFile(Opened):
    """An opened Nibble model. base3: names of the layers stored so, which `layer` gives in the layout of
    memory as any other.

    Raises PackError naming the file and the key.
    """

    kind = "Nibble model"

    def __init__(self, path):
        self.path = Path(path)
        self._file = open_safetensors(self.path)
        text = (self._file.metadata() or {}).get("nibble")
        if text is None:
            raise PackError(
                f"{self.path}: a safetensors file, but not one written by Nibble (no 'nibble' entry in its "
                "header). Load full-precision models with Load Diffusion Model."
            )
        header = self._parse(text)
        self.family, self.provenance = header["family"], header["provenance"]
        self.report = [self._row(index, row) for index, row in enumerate(header["report"])]
        self._keys = set(self._file.keys())
        self.base3 = frozenset(header.get("base3", ()))
        self.specs, owned = {}, set()
        for name, raw in header["layers"].items():
            try:
                self.specs[name] = spec = spec_json.from_json(raw)
            except SpecError as error:
                raise PackError(f"{self.path}: description of layer {name}: {error}") from error
            if name in self.base3 and any(p.weight.bits != 2 for p in spec.parts):
                raise PackError(
                    f"{self.path}: layer {name} is said to be in base 3, which takes weights of 2 bits: "
                    f"{spec.describe()}"
                )
            for leaf, shape in spec.shapes().items():
                key = f"{name}.{leaf}"
                if leaf == "weight" and name in self.base3:
                    shape = (spec.out_features, -(-spec.width // TRITS))
                if key not in self._keys:
                    raise PackError(
                        f"{self.path}: the header describes layer {name}, but the tensor {key} is missing"
                    )
                found = tuple(self._file.get_slice(key).get_shape())
                if found != shape:
                    raise PackError(
                        f"{self.path}: {key}: expected the shape {shape} from the header, found {found}"
                    )
                owned.add(key)
        if header["version"] >= 3:
            self._keys -= {k for k in self._keys if k.startswith(stop.PREFIX)}
        self.origin = self._origin(header.get("origin", {}), owned)
        if unknown := self.base3 - set(self.specs):
            raise PackError(
                f"{self.path}: layers said to be in base 3 that the header does not describe: "
                f"{', '.join(sorted(unknown)[:3])}"
            )
        self.rest = sorted(self._keys - owned)
        self._require_described()
        # Last: what is said above is more to the point.
        digests.require_description(self.path, self._file, PackError)

    def _origin(self, value, owned) -> Origin:
        def read(name):
            if (key := f"{BESIDE}{name}") not in self._keys:
                raise CheckpointError(f"'origin' names the tensor {name}, but {key} is missing")
            owned.add(key)
            return self._file.get_tensor(key)

        try:
            return Origin.from_json(value, read)
        except CheckpointError as error:
            raise PackError(f"{self.path}: header entry {error}") from error

    def _require_described(self):
        """A layer without its description would be taken for one in 16 bit: its codes for weights."""
        for key in self.rest:
            name, _, leaf = key.rpartition(".")
            if leaf in _LEAVES or (
                leaf == "weight" and self._file.get_slice(key).get_dtype() in ("I8", "U8")
            ):
                raise PackError(
                    f"{self.path}: {key} belongs to a quantized layer, but the header does not describe "
                    f"the layer {name}. The file is damaged: "
                    "download it or quantize the model again."
                )

    def _row(self, index, row) -> dict:
        try:
            return Row.from_json(row).to_json()
        except NotOurs as error:
            raise PackError(f"{self.path}: header entry 'report', row {index}: {error}") from error

    def _parse(self, text):
        try:
            header = own_json.parse(text)
            version = own_json.field(header, "version", int, 1)
            if version > VERSION:
                raise PackError(
                    f"{self.path}: format version {version}; this version of the pack reads up to "
                    f"{VERSION}. Update ComfyUI-Nibble."
                )
            for key, kind in {"family": str, "layers": dict, "provenance": dict, "report": list}.items():
                own_json.field(header, key, kind)
            by_name(header["family"])
        except NotOurs as error:
            raise PackError(f"{self.path}: header entry 'nibble': {error}") from error
        except UnknownArchitecture as error:
            raise PackError(f"{self.path}: {error} Update ComfyUI-Nibble.") from error
        trits = header.get("base3", [])
        if (
            not isinstance(trits, list)
            or not all(isinstance(name, str) for name in trits)
            or (trits and version < 2)
        ):
            raise PackError(
                f"{self.path}: header entry 'base3': expected names of layers in a file of version 2, "
                f"found {str(trits)[:80]!r}"
            )
        return header

    def layer(self, name: str) -> QuantizedLayer:
        """One layer, memory-mapped but for weights in base 3."""
        tensors = {
            leaf: self._file.get_tensor(f"{name}.{leaf}")
            for leaf in TENSOR_NAMES
            if leaf in self.specs[name].shapes()
        }
        try:
            if name in self.base3:
                tensors["weight"] = self._trits(name, tensors["weight"])
            return QuantizedLayer(name, self.specs[name], tensors)
        except SpecError as error:
            raise PackError(f"{self.path}: {error}") from error

    def _trits(self, name, packed) -> torch.Tensor:
        if packed.dtype != torch.uint8:
            raise SpecError(f"layer {name}: weight in base 3 has the dtype {packed.dtype}, not torch.uint8")
        try:
            return pack(unpack_base3(packed, self.specs[name].width), 2)
        except ValueError as error:
            raise SpecError(f"layer {name}: weight: {error}") from error

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())
