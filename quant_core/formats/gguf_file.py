"""GGUF files as sources: their tensors under their own names, in real values, as the package gguf reads and
dequantizes them."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ...kernels.operator.errors import shortened
from ..store.safe import GGUF, CheckpointError

EXTRA = "python -m pip install 'nibble-quant[gguf]'"
FLOATS = ("F64", "F32", "F16", "BF16")
# The package reads a header as it comes: sizes and types that make no sense end in any of these.
DAMAGED = ValueError, LookupError, TypeError, OverflowError, MemoryError
_SHAPE = "comfy.gguf.orig_shape."  # of tensors that ComfyUI-GGUF stores in another one


@dataclass(frozen=True)
class _Slice:
    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype


class GGUFFile:
    """What `store.safe.SafeFile` offers, of a GGUF file, in bf16 where it is below 16 bit; dtypes are ggml's
    names: F16, Q8_0, Q4_K.

    saved: {key of a tensor below 16 bit: bytes that it takes less than in 16}.
    Raises CheckpointError naming the file where it is damaged, ImportError without the package gguf.
    """

    def __init__(self, path: Path):
        self.path, self._gguf = Path(path), _package(path)
        try:
            reader = self._gguf.GGUFReader(path)
            self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
            self._slices = {
                name: _Slice(_shape(reader, tensor), tensor.tensor_type.name)
                for name, tensor in self._tensors.items()
            }
        except DAMAGED as error:
            raise CheckpointError(
                f"{path}: not a whole GGUF file ({shortened(str(error))}). Download it again."
            ) from error

        self.saved = {
            name: 2 * tensor.n_elements - tensor.n_bytes
            for name, tensor in self._tensors.items()
            if self._slices[name].dtype not in FLOATS
        }

    def keys(self) -> list[str]:
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        return {}

    def get_slice(self, key: str) -> _Slice:
        return self._slices[key]

    def get_tensor(self, key: str) -> torch.Tensor:
        tensor, slice_ = self._tensors[key], self._slices[key]
        if slice_.dtype in FLOATS and slice_.dtype != "BF16":
            return torch.from_numpy(np.array(tensor.data)).reshape(slice_.shape)
        return dequantized(tensor.data, tensor.tensor_type, slice_.shape, f"{self.path}: {key}")


def dequantized(data: np.ndarray, kind: Any, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """The values in bf16 of ggml's bytes. kind: the package's GGMLQuantizationType; where: names the tensor
    in the CheckpointError for a type that the package does not know."""
    try:
        values = _package(where).dequantize(data, kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{where}: the package gguf does not dequantize {kind.name}. Take a newer one, or another file "
            "of the model."
        ) from error
    return torch.from_numpy(values).to(torch.bfloat16).reshape(shape)


def _package(path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path}: {GGUF} (needs the package gguf: {EXTRA}).") from error
    return gguf


def _shape(reader, tensor) -> tuple[int, ...]:
    """Outermost dimension first, as PyTorch has it."""
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    field = reader.get_field(f"{_SHAPE}{tensor.name}")
    if field is None:
        return shape
    original = tuple(int(field.parts[i][0]) for i in field.data)
    if np.prod(original) != np.prod(shape):
        raise ValueError(f"{tensor.name}: {_SHAPE[:-1]} is {original}, the tensor has {shape}")
    return original
