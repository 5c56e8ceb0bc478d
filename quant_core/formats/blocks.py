"""Declared layers in nvfp4, mxfp8 and asym_w4a8_int8 as a source: what they hold beside a weight, and its
real values."""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod

import torch

from ..store.safe import CheckpointError
from .kitchen.declared import BLOCKS, Declaration
from .kitchen.dense import shape_of, weight_of
from .kitchen.stored import LayoutError, Stored, gather

BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # of a value by its dtype; of all others here one


def phrase_of(kinds: Counter[str]) -> str:
    """{format: weights in it} -> "304 weights in nvfp4, 2 weights in mxfp8"."""
    return ", ".join(f"{count} weights in {kind}" for kind, count in sorted(kinds.items()))


class Blocks:
    """Weights in blocks of a file.

    shapes: {key of a weight: its real shape}; beside: keys of the tensors that are no part of the model;
    kinds: {format: weights in it}; phrase: "304 weights in nvfp4", "" without any; saved: bytes that all of
    it takes less than in 16 bit.
    """

    def __init__(
        self,
        path,
        declared: Mapping[str, Declaration],
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, str],
        read: Callable[[str], torch.Tensor],
    ):
        """Raises CheckpointError for a layer whose tensors are not what its format asks for."""
        self._read, self._layers = read, {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.beside: set[str] = set()
        mine = {name: d for name, d in declared.items() if d is not None and d.format in BLOCKS}
        leaves: dict[str, dict[str, Stored]] = {name: {} for name in mine}
        for key in shapes:
            name, _, leaf = key.rpartition(".")
            if name in leaves:
                leaves[name][leaf] = Stored(key, shapes[key], dtypes[key])
        for name, declaration in mine.items():
            try:
                stored = gather(declaration, leaves[name])
                self.shapes[f"{name}.weight"] = shape_of(declaration, stored)
            except LayoutError as error:
                raise CheckpointError(
                    f"{path}: layer {name}: {error}. Download or export the file again."
                ) from error
            self._layers[f"{name}.weight"] = declaration, stored
            self.beside |= {f"{name}.{leaf}" for leaf in leaves[name]} - {f"{name}.weight", f"{name}.bias"}
        self.kinds = Counter(d.format for d in mine.values())
        self.phrase = phrase_of(self.kinds)
        held = [s for _, stored in self._layers.values() for leaf, s in stored.items() if leaf != "bias"]
        nbytes = sum(prod(s.shape) * BYTES.get(s.dtype, 1) for s in held)
        self.saved = 2 * sum(map(prod, self.shapes.values())) - nbytes

    def get(self, key: str) -> torch.Tensor:
        """The real weight (N, K) of one of `shapes`, in bf16."""
        declaration, stored = self._layers[key]
        return weight_of(declaration, lambda leaf: self._read(stored[leaf].key) if leaf in stored else None)
