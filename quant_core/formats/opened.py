"""What every opened file of a quantized model offers, whatever its format."""

import math
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path

import torch

from ...kernels.operator.spec import LinearSpec
from ..layer.linear import QuantizedLayer
from ..layer.soundness import largest
from ..store import digests
from ..store.progress import Progress, silent
from ..store.safe import CheckpointError, open_safetensors
from .origin import Origin


class Opened(ABC):
    """Nothing is read but headers until a layer or a tensor is asked for.

    path: the file or folder. kind: one short phrase for reports. family: name of the family, whose ComfyUI
    key names are used throughout. specs: {layer name: LinearSpec}. rest: keys of all other tensors.
    provenance, report: as the pack's own file has them, empty where the format has none. notes: sentences on
    what reading changes of what the file holds; empty where nothing is lost. origin: what the model's source
    said beside its weights.
    """

    path: Path
    kind: str
    family: str
    specs: dict[str, LinearSpec]
    rest: list[str]
    provenance: dict
    report: list
    origin: Origin = Origin()

    @property
    def notes(self) -> tuple[str, ...]:
        """Of most files nothing is changed as they are read."""
        return ()

    @abstractmethod
    def layer(self, name: str) -> QuantizedLayer:
        """One quantized layer in the layout of memory."""

    @abstractmethod
    def tensor(self, key: str) -> torch.Tensor:
        """One of `rest`, memory-mapped where nothing has to be changed on it."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one of `rest`, from the header."""

    @property
    def files(self) -> list[Path]:
        """The files that are read; none for a model in the graph."""
        return sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]

    @property
    def inputs(self) -> list[Path]:
        """These, and what else in a folder says what the model is: nothing is written over them."""
        beside = self.path.glob("*.json") if self.files and self.path.is_dir() else ()
        return [*self.files, *beside]

    def sound_layer(self, name: str) -> QuantizedLayer:
        """The same, to be run: one NaN among scales or smoothing would make a black picture. Raises
        CheckpointError naming file and tensor.

        It reads the side data, which are to be moved anyway: 0.5 GB of FLUX.1 in 4 bit take 0.2 s on one
        core.
        """
        layer = self.layer(name)
        for key, tensor in layer.tensors.items():
            if tensor.is_floating_point() and not math.isfinite(largest(tensor)):
                raise CheckpointError(
                    f"{self.path}: {name}.{key}: NaN or Inf. The file is damaged: download it or quantize "
                    "the model again."
                )
        return layer

    def verify(self, progress: Progress = silent) -> int:
        """Reads every tensor and returns how many bytes agree with the hashes in the header; -1 where the
        file has none. Raises CheckpointError naming what does not agree."""
        if self.files != [self.path]:
            return -1
        return digests.verify(self.path, open_safetensors(self.path), CheckpointError, progress)

    def rest_bytes(self) -> int:
        """Of `rest` in 16 bit, as ComfyUI holds it."""
        return sum(2 * prod(self.shape(key)) for key in self.rest)

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """{key: shape} of the model as if it had never been quantized: what model detection wants to see."""
        shapes = {key: self.shape(key) for key in self.rest}
        for name, spec in self.specs.items():
            shapes[f"{name}.weight"] = spec.logical_shape
            if spec.bias:
                shapes[f"{name}.bias"] = (spec.out_features,)
        return shapes
