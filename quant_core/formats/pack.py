"""The pack's own file: one safetensors file with packed layers, the untouched rest, and a JSON description in its header.

Metadata key "nibble": {"version", "family", "layers": {name: LinearSpec}, "provenance", "report"}. Tensor keys are
ComfyUI's module names with the suffixes that LinearSpec lists.
"""

import json
from pathlib import Path

import torch

from ..linear import QuantizedLayer
from ..spec import TENSOR_NAMES, LinearSpec, SpecError
from .atomic import save_tensors
from .checkpoint import CheckpointError, open_safetensors

VERSION = 1


class PackError(CheckpointError):
    """A file that claims to be a Nibble model and is not a sound one."""


def save(path, layers: dict[str, QuantizedLayer], rest: dict[str, torch.Tensor], family: str, provenance: dict, report: list):
    """Writes a model under a temporary name and renames it. rest: {key: tensor} of all that is not quantized."""
    tensors = {f"{name}.{leaf}": t for name, layer in layers.items() for leaf, t in layer.tensors.items()}
    if both := set(tensors) & set(rest):
        raise ValueError(f"tensors given twice, as part of a quantized layer and apart: {sorted(both)[:3]}")
    header = {
        "version": VERSION,
        "family": family,
        "layers": {name: layer.spec.to_json() for name, layer in layers.items()},
        "provenance": provenance,
        "report": report,
    }
    everything = {k: t.detach().cpu().contiguous() for k, t in (tensors | rest).items()}
    save_tensors(Path(path), everything, {"format": "pt", "nibble": json.dumps(header)})


class PackFile:
    """An opened Nibble model. Nothing is read but the header until a layer is asked for.

    family, provenance, report: as saved. specs: {layer name: LinearSpec}. rest: keys of the 16-bit tensors.
    Raises PackError naming the file and the key.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._file = open_safetensors(self.path)
        text = (self._file.metadata() or {}).get("nibble")
        if text is None:
            raise PackError(
                f"{self.path}: a safetensors file, but not one written by Nibble (no 'nibble' entry in its header). Load full-precision models with Load Diffusion Model."
            )
        header = self._parse(text)
        self.family, self.provenance, self.report = header["family"], header["provenance"], header["report"]
        self._keys = set(self._file.keys())
        self.specs, owned = {}, set()
        for name, raw in header["layers"].items():
            try:
                self.specs[name] = spec = LinearSpec.from_json(raw)
            except (SpecError, TypeError) as error:
                raise PackError(f"{self.path}: description of layer {name}: {error}") from error
            for leaf, shape in spec.shapes().items():
                key = f"{name}.{leaf}"
                if key not in self._keys:
                    raise PackError(f"{self.path}: the header describes layer {name}, but the tensor {key} is missing")
                found = tuple(self._file.get_slice(key).get_shape())
                if found != shape:
                    raise PackError(f"{self.path}: {key}: expected the shape {shape} from the header, found {found}")
                owned.add(key)
        self.rest = sorted(self._keys - owned)

    def _parse(self, text):
        try:
            header = json.loads(text)
        except json.JSONDecodeError as error:
            raise PackError(f"{self.path}: the 'nibble' entry of the header is not JSON ({error})") from error
        version = header.get("version") if isinstance(header, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise PackError(
                f"{self.path}: format version {version}; this version of the pack reads up to {VERSION}. Update ComfyUI-Nibble."
            )
        wanted = {"version": int, "family": str, "layers": dict, "provenance": dict, "report": list}
        for key, kind in wanted.items():
            if not isinstance(header, dict) or not isinstance(header.get(key), kind):
                raise PackError(
                    f"{self.path}: header entry {key!r}: expected {kind.__name__}, found {type(header).__name__ if not isinstance(header, dict) else header.get(key)!r}"
                )
        return header

    def layer(self, name: str) -> QuantizedLayer:
        """One layer, memory-mapped."""
        tensors = {leaf: self._file.get_tensor(f"{name}.{leaf}") for leaf in TENSOR_NAMES if leaf in self.specs[name].shapes()}
        try:
            return QuantizedLayer(name, self.specs[name], tensors)
        except SpecError as error:
            raise PackError(f"{self.path}: {error}") from error

    def tensor(self, key: str) -> torch.Tensor:
        """One of the 16-bit tensors, memory-mapped."""
        return self._file.get_tensor(key)

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """{key: shape} of the model as if it had never been quantized: what model detection wants to see."""
        shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self.rest}
        for name, spec in self.specs.items():
            shapes[f"{name}.weight"] = (spec.out_features, spec.in_features)
            if spec.bias:
                shapes[f"{name}.bias"] = (spec.out_features,)
        return shapes
