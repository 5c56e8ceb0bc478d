"""ComfyUI's asym_w4a8_int8 layers as the one operator's: W8A8 behind a rotation.

Source: backends/eager and backends/cuda of comfy-kitchen 0.2.31 and 0.2.40, and ComfyUI 0.33's comfy.ops. The
codes of a group, out of a table or less 8, times its scale are rounded to int8, and these whole numbers are
what is multiplied. In int8 they take twice the memory of the file. In 0.2.40 a row may have codes of 6 bits,
less 32: all low halves as those of 4 bits, then the upper two bits of all.

A weight_correction makes a layer none of the operator's: comfy.ops does not read it, comfy-kitchen's CUDA
backend multiplies it by the sums of x's codes, and its eager backend then quantizes no x at all.
"""

from collections.abc import Callable
from typing import cast

import torch

from ....kernels.operator.packing import unpack
from ....kernels.operator.spec import ActivationSpec, PartSpec, WeightSpec
from .declared import Declaration

CORRECTION = "weight_correction"


def part_of(declared: Declaration, k: int) -> PartSpec:
    """The one part of a layer with k in-channels."""
    activation = ActivationSpec(declared.activation_bits, "token") if declared.activation_bits else None
    return PartSpec(
        0,
        k,
        WeightSpec(8, "channel"),
        activation,
        rotation=declared.rotation,
    )


def bits_of(width: int, k: int) -> int:
    """Of the codes in a row of `width` bytes for k in-channels: 4 or 6, 0 where it is neither."""
    return next((bits for bits in (4, 6) if width * 8 == k * bits), 0)


def tensors_of(get: Callable[[str], torch.Tensor | None], k: int) -> dict[str, torch.Tensor]:
    """The layer but for its bias in the layout of memory. get: our name -> the file's tensor; k:
    in-channels."""
    scale = cast(torch.Tensor, get("weight_s_channel"))
    return {"weight": codes_of(get, k), "weight_scale": scale.reshape(1, -1)}


def codes_of(get: Callable[[str], torch.Tensor | None], k: int) -> torch.Tensor:
    """The whole numbers (N, K) int8 that ComfyUI multiplies."""
    has = cast(Callable[[str], torch.Tensor], get)
    packed, table = has("weight").view(torch.int8), get("weight_codebook")
    codes = unpack(packed[:, : k // 2], 4, unsigned=True)
    if bits_of(packed.shape[1], k) == 6:
        values = codes.float() + 16 * unpack(packed[:, k // 2 :], 2, unsigned=True).float() - 32
    else:
        values = codes.float() - 8 if table is None else table.float()[codes.long()]
    relative = has("weight_s_rel")
    if relative.dtype == torch.uint8:
        relative = relative.view(torch.float8_e4m3fn)
    grouped = values.unflatten(-1, (relative.shape[-1], -1)) * relative.float().unsqueeze(-1)
    return grouped.flatten(-2).round().clamp(-127, 127).to(torch.int8)
