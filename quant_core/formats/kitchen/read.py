"""Files quantized for ComfyUI itself, for comfy-kitchen or by comfy-quants, read into the one operator.

svdquant_w4a4, convrot_w4a4, int8_tensorwise, awq_w4a16, nvfp4 and asym_w4a8_int8 compute what comfy-kitchen's
eager ops compute. fp8 and mxfp8 layers, and those of asym_w4a8_int8 with a weight_correction, become bf16.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ....kernels.operator.spec import LinearSpec, SpecError
from ...layer.linear import QuantizedLayer
from ...layer.row import Row
from ...store import own_json
from ...store.own_json import NotOurs
from ...store.safe import CheckpointError, open_safetensors
from ..checkpoint import family_of
from ..opened import Opened
from ..origin import Origin, decoded, is_beside, outside, size
from ..prefixes import network
from . import declared
from .declared import NVFP4, W4A8, Declaration, DeclarationError
from .dense import shape_of, weight_of
from .layers import spec_of, tensors_of
from .stored import LayoutError, Stored, gather
from .w4a8 import CORRECTION

PROVENANCE = "nibble_export"  # header entry of our own exports; ComfyUI reads no entry that it does not know


def is_kitchen(keys: Iterable[str], metadata: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file with these keys and header entries declares quantized layers as ComfyUI
    does."""
    return declared.HEADER in (metadata or {}) or any(k.endswith(f".{declared.LEAF}") for k in keys)


class KitchenFile(Opened):
    """One safetensors file with layers declared by `<layer>.comfy_quant` tensors, by the
    `_quantization_metadata` header, or by both.

    formats: {layer: what it is declared as}. Prefixes of whole checkpoints are stripped. Raises
    CheckpointError naming the file and the key for what is no sound file or has no layer that this pack runs,
    and UnknownArchitecture for models without blocks of linear layers.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path):
        self.path = Path(path)
        self._file = open_safetensors(self.path)
        metadata, raw = self._file.metadata() or {}, list(self._file.keys())
        names = network(raw, str(self.path))
        prefix, self._keys = (
            names.prefix,
            {name: key for name, key in names.keys.items() if not is_beside(name)},
        )
        found = self._declared(metadata.get(declared.HEADER), prefix, set(raw))
        self._layers: dict[str, tuple[Declaration, dict[str, Stored]]] = {}
        self.specs: dict[str, LinearSpec] = {}
        leaves = {name: {} for name in found}
        for key in self._keys:
            name, _, leaf = key.rpartition(".")
            if name in leaves:
                leaves[name][leaf] = self._stored(key)
        for name, declaration in found.items():
            try:
                stored = gather(declaration, leaves[name])
                spec = spec_of(declaration, stored, self._tensor_of(stored))
            except (LayoutError, SpecError) as error:
                raise CheckpointError(
                    f"{self.path}: layer {name}: {error}. Download or export the file again."
                ) from error
            self._layers[name] = declaration, stored
            if spec is not None:
                self.specs[name] = spec
        self.formats = {name: declaration.format for name, (declaration, _) in self._layers.items()}
        formats = Counter(self.formats.values())
        if not self.specs:
            raise CheckpointError(
                f"{self.path}: no layer of its diffusion model is quantized in a way that this pack runs "
                "(found: "
                f"{', '.join(f'{c} {f}' for f, c in formats.items()) or 'none'}){_why_not(formats)}. Load it "
                "with Load Diffusion Model."
            )
        side = {f"{name}.{leaf}" for name in found for leaf in leaves[name]}
        dense = {f"{name}.{leaf}" for name in found if name not in self.specs for leaf in ("weight", "bias")}
        self.rest = sorted(set(self._keys) - (side - dense))
        self.family = self._family()
        self.kind = f"ComfyUI quantized model ({', '.join(f'{c} {f}' for f, c in formats.items())})"
        exported = self._exported(metadata.get(PROVENANCE))
        self.provenance, self.report = exported["provenance"], exported["report"]
        kept, dropped = outside({key: size(self._file.get_slice(key)) for key in names.outside})
        beside = [*kept, *(key for name, key in names.keys.items() if is_beside(name))]
        self.origin = self._origin(
            metadata, exported["host"], {key: self._file.get_tensor(key) for key in beside}
        )
        self.notes = (*self._notes(leaves, len(names.outside) - len(kept)), *dropped)

    def _stored(self, key) -> Stored:
        view = self._file.get_slice(self._keys[key])
        return Stored(key, tuple(view.get_shape()), view.get_dtype())

    def _declared(self, header, prefix, raw) -> dict[str, Declaration]:
        """{layer: Declaration} of both places, which must agree."""
        try:
            in_header = declared.of_header(header)
        except DeclarationError as error:
            raise CheckpointError(f"{self.path}: header entry {declared.HEADER!r}: {error}.") from error
        # Names come with the prefix or without it; in a whole checkpoint they may also be of its text
        # encoders.
        outside = {
            name for name in in_header if prefix and not name.startswith(prefix) and f"{name}.weight" in raw
        }
        found = {name.removeprefix(prefix): d for name, d in in_header.items() if name not in outside}
        if missing := sorted(name for name in found if f"{name}.weight" not in self._keys):
            raise CheckpointError(
                f"{self.path}: header entry {declared.HEADER!r} declares the layer {missing[0][:200]} as "
                f"{found[missing[0]].format}, but the "
                f"tensor {missing[0][:200]}.weight is missing ({len(missing)} such layers). The file is "
                "not whole: download or export it again."
            )
        for key in self._keys:
            name, _, leaf = key.rpartition(".")
            if leaf != declared.LEAF:
                continue
            stored = self._stored(key)
            try:
                here = declared.of_tensor(
                    stored.shape, stored.dtype, lambda key=key: self._file.get_tensor(self._keys[key])
                )
            except DeclarationError as error:
                raise CheckpointError(f"{self.path}: {key}: {error}.") from error
            if found.setdefault(name, here) != here:
                raise CheckpointError(
                    f"{self.path}: layer {name}: {key} says '{here}', the header entry {declared.HEADER!r} "
                    f"says '{found[name]}'. Export the file again."
                )
        return found

    def _family(self) -> str:
        shapes = self.logical_shapes()
        family = family_of(shapes, self.path)
        if not family.matches(shapes):
            raise CheckpointError(
                f"{self.path}: its tensors have diffusers' names, expected ComfyUI's for {family.title}, "
                "whose quantized layers stack several "
                "of diffusers'. Quantize the full-precision model with Nibble Quantize, or take a file "
                "made for ComfyUI."
            )
        return family.name

    def _exported(self, text) -> dict:
        """Our own header entry; empty in any other file."""
        empty: dict[str, dict | list] = {"provenance": {}, "report": [], "host": {}}
        if text is None:
            return empty
        try:
            found = empty | own_json.parse(text)
            for key, value in empty.items():
                own_json.field(found, key, type(value))
            return found | {"report": [Row.from_json(row).to_json() for row in found["report"]]}
        except NotOurs as error:
            raise CheckpointError(
                f"{self.path}: header entry {PROVENANCE!r}: {error}. Download or export the file again."
            ) from error

    def _origin(self, metadata, host, beside) -> Origin:
        """What ComfyUI's detection sees in the file, and the record of the host in our own entry."""
        try:
            return Origin.of_header(metadata, host=decoded(host), beside=beside)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: header entry {PROVENANCE!r}: {error}") from error

    def _notes(self, leaves, outside):
        dense = Counter(d.format for name, (d, _) in self._layers.items() if name not in self.specs)
        for kind, count in dense.items():
            yield (
                f"{kind} layers ({count}) are read as bf16, weight times scale{_why_not([kind])}: they take "
                f"{'3.5 times' if kind == W4A8 else 'twice'} the memory, and their input is not quantized"
            )
        if static := sum(
            "input_scale" in of and self.formats[name] != NVFP4
            for name, of in leaves.items()
            if name in self.specs
        ):
            yield (
                f"the input_scale of layers ({static}) is not used: x takes its range as it comes, as in "
                "comfy-kitchen"
            )
        if outside:
            yield (
                f"tensors outside of the diffusion model ({outside}), of text encoders or a VAE, are left out"
            )

    def _tensor_of(self, stored):
        """Our name of a layer's tensor -> the tensor, None where there is none."""
        return lambda leaf: self._file.get_tensor(self._keys[stored[leaf].key]) if leaf in stored else None

    def layer(self, name: str) -> QuantizedLayer:
        """One layer; convrot, int8 and natural svdquant weights memory-mapped, others rearranged."""
        declaration, stored = self._layers[name]
        get = self._tensor_of(stored)
        try:
            return QuantizedLayer(name, self.specs[name], tensors_of(declaration, self.specs[name], get))
        except LayoutError as error:
            raise CheckpointError(
                f"{self.path}: layer {name}: {error}. Download or export the file again."
            ) from error
        except SpecError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def tensor(self, key: str) -> torch.Tensor:
        """One of `rest`; the real weight of a layer that is read as bf16."""
        name, _, leaf = key.rpartition(".")
        if leaf != "weight" or name not in self._layers:
            return self._file.get_tensor(self._keys[key])
        declaration, stored = self._layers[name]
        return weight_of(declaration, self._tensor_of(stored))

    def shape(self, key: str) -> tuple[int, ...]:
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and name in self._layers:
            return shape_of(*self._layers[name])
        return self._stored(key).shape


def _why_not(formats) -> str:
    """Why layers of these formats are none that run here, as an aside."""
    reasons = []
    if set(formats) & set(declared.DENSE):
        reasons.append("ComfyUI multiplies them itself, this pack has no products of 8-bit floats")
    if W4A8 in formats:
        reasons.append(f"ComfyUI leaves out their {CORRECTION}, comfy-kitchen's backends differ on it")
    return "; ".join(reasons) and f" ({'; '.join(reasons)})"
