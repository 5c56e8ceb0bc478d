"""fp8 as a source: with scales, in the two ways that ComfyUI writes them, and without; what becomes of dtypes
that have no arithmetic."""

from collections import Counter
from collections.abc import Callable
from math import prod

import torch

from ..store.safe import CheckpointError

MARKER = "scaled_fp8"  # an empty tensor in files of the older way
WEIGHT_SCALES = ("scale_weight", "weight_scale")  # older, newer
BESIDE = ("scale_input", "input_scale", "comfy_quant")
FP8 = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}  # ComfyUI's name of the format: safetensors' of the dtype
PACKED = ("I8", "U8", "I16", "I32", "I64")


class Scales:
    """What stands beside the weights of an fp8 checkpoint.

    keys: of the tensors that are no part of the model; kinds: {ComfyUI's name of the dtype: weights in it};
    phrase: on them and their scales, "" without any; held: keys of all that is in fp8; values: how many
    numbers that are.

    Source: comfy.utils.convert_old_quants and comfy.ops of ComfyUI 0.33: weight = fp8 value x weight_scale, a
    scalar or one a row.
    """

    def __init__(self, path, shapes: dict, dtypes: dict[str, str], read: Callable[[str], torch.Tensor]):
        """Raises CheckpointError for packed weights, scales without an fp8 weight and scales of a wrong
        kind."""
        self.path, self.read, self.of = path, read, {}
        packed = [k for k, d in dtypes.items() if d in PACKED and k.endswith((".weight", ".qweight"))]
        if packed:
            raise CheckpointError(
                f"{path}: {packed[0]} is of dtype {dtypes[packed[0]]}: quantized already. `nibble convert` "
                "and Nibble Load Diffusion Model "
                "read such files; quantizing starts from 16 bit or fp8."
            )
        self.keys = {k for k in shapes if k == MARKER or k.rpartition(".")[2] in BESIDE}
        for key, shape in shapes.items():
            name, _, leaf = key.rpartition(".")
            weight = f"{name}.weight"
            if leaf not in WEIGHT_SCALES or weight not in shapes:
                continue
            if dtypes[weight] not in FP8.values():
                raise CheckpointError(
                    f"{path}: {key} is a scale, but {weight} is {dtypes[weight]}, not fp8. The file mixes "
                    "formats."
                )
            rows = shapes[weight][0]
            if dtypes[key] not in ("F32", "F16", "BF16") or shape not in (
                (),
                (1,),
                (1, 1),
                (rows,),
                (rows, 1),
            ):
                raise CheckpointError(
                    f"{path}: {key}: expected one float, or {rows}, found {dtypes[key]} {list(shape)}"
                )
            self.keys.add(key)
            self.of[weight] = key
        names = {dtype: name for name, dtype in FP8.items()}
        held = {key: names[dtype] for key, dtype in dtypes.items() if dtype in names and key not in self.keys}
        self.held = set(held)
        self.values = sum(prod(shapes[key]) for key in held)
        self.phrase = self._phrase(held, shapes)

    def _phrase(self, held, shapes) -> str:
        weights = [key for key in held if key.endswith(".weight") and len(shapes[key]) > 1]
        self.kinds = Counter(held[key] for key in weights)
        kinds = Counter(f"{held[key]} with {self._grain(key, shapes)}" for key in weights)
        words = [f"{count} weights in {kind}" for kind, count in kinds.most_common()]
        return ", ".join(
            words + [f"{len(held) - len(weights)} other tensors in fp8"] * (len(held) > len(weights))
        )

    def _grain(self, key, shapes) -> str:
        if key not in self.of:
            return "no scales"
        return "a scale a row" if prod(shapes[self.of[key]]) > 1 else "a scale a tensor"

    def apply(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """The real values of a tensor, bf16 where it has a scale: 2^-9 of a value beside fp8's own 2^-4."""
        if key not in self.of:
            return computable(tensor)
        return real_values(tensor, self.read(self.of[key]))


def real_values(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp8 (N, ...) times its scale, of one or N values, in bf16."""
    return (tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))).to(torch.bfloat16)


def computable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a source in the dtype that it is quantized, or written, in: 8-bit floats in bf16, which
    holds all of their values, fp64 in fp32; itself in any other dtype, whole numbers too. Files that hold
    their biases and norms in fp8 are the usual ones of FLUX."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to({1: torch.bfloat16, 8: torch.float32}.get(tensor.dtype.itemsize, tensor.dtype))
