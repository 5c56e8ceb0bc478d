"""A model in full precision, as what quantizes asks for it: whether it lies in a file, in memory or in a
graph."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch

from ..families import Family, detect
from ..families.fingerprint import fingerprint
from .unfinished import hash_of


class Weights(Protocol):
    """Tensors in full precision under ComfyUI's key names. shapes: {key: shape} of those there are."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def get(self, key: str) -> torch.Tensor:
        """The tensor of a key, in a dtype that has arithmetic."""
        ...


class Source(Weights, Protocol):
    """The Weights of a whole model: `formats.checkpoint.Checkpoint`, the nodes' `ModelSource`, `Tensors`."""

    @property
    def family(self) -> Family: ...

    def fingerprint(self) -> str:
        """What calibrations and unfinished work are tied to."""
        ...


class Tensors:
    """A state dict {ComfyUI key: tensor} as a Source.

    Example: `quantize_layers(FLUX.layers(source.shapes), source := Tensors(state), method, method.config)`.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]):
        self._state = state
        self.shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}

    @property
    def family(self) -> Family:
        """Raises UnknownArchitecture for a model that has no layers to quantize."""
        return detect(self.shapes)

    def get(self, key: str) -> torch.Tensor:
        return self._state[key]

    def fingerprint(self) -> str:
        return fingerprint(self.family.mapped(self.shapes), self.get)


def rest_of(source: Weights, quantized: Iterable[str]) -> Iterator[str]:
    """The keys of tensors that stay as they are, in the order of the source."""
    names = set(quantized)
    return (key for key in source.shapes if key.rpartition(".")[0] not in names)


class Remembered:
    """Weights of which the layer asked for last is kept: its tensors are hashed, then fitted, and read
    once."""

    def __init__(self, source: Weights):
        self._source, self.shapes = source, source.shapes
        self._held: dict[str, torch.Tensor] = {}
        self._layer = ""

    def get(self, key: str) -> torch.Tensor:
        layer = key.rpartition(".")[0]
        if layer != self._layer:
            self._held, self._layer = {}, layer
        if key not in self._held:
            self._held[key] = self._source.get(key)
        return self._held[key]

    def hash_of(self, layer: str) -> str:
        """Of its weight and bias."""
        keys = (f"{layer}.{leaf}" for leaf in ("weight", "bias"))
        return hash_of(self.get(key) for key in keys if key in self.shapes)
