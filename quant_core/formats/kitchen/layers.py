"""comfy-kitchen's tensor layouts as the one operator's, format by format.

Source: comfy_kitchen/tensor and backends/eager of comfy-kitchen 0.2.31, whose eager ops give the same
outputs.
"""

from collections.abc import Callable, Container
from typing import cast

import torch

from ....kernels.operator.quantizers import GROUP
from ....kernels.operator.spec import GELU_SHIFT, ActivationSpec, LinearSpec, PartSpec, WeightSpec
from ..zero_points import indicators, signed
from . import nvfp4, w4a8
from .declared import DENSE, NVFP4, W4A8, Declaration
from .dense import shape_of
from .stored import FLOATS, SIXTEEN, LayoutError, Stored, check

TILE = 128  # out-channels of a tile of kitchen_tile_packed_w4a4
INNER = (TILE // 4, 4 * GROUP // 2)  # four rows of one group of 64 side by side
WIDEST_AWQ = 65536  # its low rank takes K^2 / 32 bytes of memory, 128 MiB here; modulation has at most 12288


def spec_of(
    declared: Declaration, stored: dict[str, Stored], get: Callable[[str], torch.Tensor | None]
) -> LinearSpec | None:
    """The layer's LinearSpec from headers, and of nvfp4 from the one number of an input_scale, which `get`
    reads; None for those that are no layers of ours (`runs`). Raises LayoutError."""
    if declared.format in (*DENSE, NVFP4, W4A8):
        n, k = shape_of(declared, stored)
        if not runs(declared, stored):
            return None
        if bias := stored.get("bias"):
            check(bias, shapes=((n,),), dtypes=FLOATS)
        four = declared.format == NVFP4
        part = nvfp4.part_of(declared, stored, k, get) if four else w4a8.part_of(declared, k)
        return LinearSpec(k, n, (part,), bias is not None)
    weight = stored["weight"]
    check(weight, dims=(2, 4) if declared.format == "svdquant_w4a4" else (2,), dtypes=("I8",))
    if len(weight.shape) == 4:
        check(weight, shapes=((*weight.shape[:2], *INNER),))
        n, k = weight.shape[0] * TILE, weight.shape[1] * GROUP
    else:
        n, k = weight.shape[0], weight.shape[1] * (1 if declared.format == "int8_tensorwise" else 2)
    step = max(16 if declared.format == "int8_tensorwise" else GROUP, declared.rotation)
    if not n or not k or k % step:
        raise LayoutError(
            f"{weight.key}: expected in-channels in groups of {step}, found {k}, with {n} out-channels"
        )
    if bias := stored.get("bias"):
        check(bias, shapes=((n,),), dtypes=FLOATS)
    activation = ActivationSpec(declared.activation_bits, "token") if declared.activation_bits else None
    if declared.format == "svdquant_w4a4":
        part = _svdquant(declared, stored, n, k)
    elif declared.format == "awq_w4a16":
        if k > WIDEST_AWQ:
            raise LayoutError(f"{weight.key}: expected at most {WIDEST_AWQ} in-channels, found {k}")
        for name in ("weight_scale", "zeros"):
            check(stored[name], shapes=((k // GROUP, n),), dtypes=FLOATS)
        part = PartSpec(
            0,
            k,
            WeightSpec(),
            None,
            rank=k // GROUP,
        )
    else:
        rows, whole = ((n,), (n, 1), (1, n)), ((), (1,), (1, 1))
        eight = declared.format == "int8_tensorwise"
        check(stored["weight_scale"], shapes=rows + whole * eight, dtypes=FLOATS)
        grain = "channel" if stored["weight_scale"].shape in rows else "tensor"
        part = PartSpec(
            0,
            k,
            WeightSpec(8 if eight else 4, grain),
            activation,
            rotation=declared.rotation,
        )
    return LinearSpec(k, n, (part,), bias is not None)


def runs(declared: Declaration, leaves: Container[str]) -> bool:
    """Whether a layer is one of the operator's, and not read as a 16-bit weight. leaves: of its tensors."""
    return declared.format not in DENSE and not (declared.format == W4A8 and w4a8.CORRECTION in leaves)


def _svdquant(declared, stored, n, k):
    down = stored["proj_down"]
    check(down, dims=(2,), dtypes=SIXTEEN)
    rank = down.shape[1]
    check(down, shapes=((k, rank),))
    check(stored["proj_up"], shapes=((n, rank), (n // TILE, rank, TILE)), dtypes=SIXTEEN)
    check(stored["weight_scale"], shapes=((k // GROUP, n), (n // TILE, k // GROUP, TILE)), dtypes=SIXTEEN)
    check(stored["smooth_factor"], shapes=((k,),), dtypes=SIXTEEN)
    # Kitchen adds the shift to x in front of its quantizer and nothing to the bias: the file's bias holds the
    # correction, as ours does.
    activation = ActivationSpec(unsigned=True, shift=GELU_SHIFT) if declared.unsigned else ActivationSpec()
    return PartSpec(
        0,
        k,
        WeightSpec(),
        activation,
        smooth=True,
        rank=rank,
    )


def tensors_of(
    declared: Declaration, spec: LinearSpec, get: Callable[[str], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """The layer in the layout of memory. get: our name -> the file's tensor, None where there is none."""
    has = cast(Callable[[str], torch.Tensor], get)  # all but the bias are there: `gather` has seen to it
    bias = get("bias")
    out = {} if bias is None else {"bias": bias}
    if declared.format == NVFP4:
        return out | nvfp4.tensors_of(spec, get)
    if declared.format == W4A8:
        return out | w4a8.tensors_of(get, spec.in_features)
    weight, scale = has("weight"), has("weight_scale")
    if declared.format == "svdquant_w4a4":
        out |= {"weight": natural_weight(weight), "smooth_factor": has("smooth_factor")}
        out["weight_scale"] = scale if scale.dim() == 2 else natural_rows(scale).T.contiguous()
        if spec.rank:
            up = has("proj_up")
            out |= {"proj_down": has("proj_down"), "proj_up": up if up.dim() == 2 else natural_rows(up)}
        return out
    if declared.format == "awq_w4a16":
        # (q - 8) scale + zero: the zeros are a low rank of one column a group.
        zeros = has("zeros")
        down, up = indicators(spec.in_features, GROUP, zeros.dtype), zeros.T.contiguous()
        return out | {"weight": signed(weight), "weight_scale": scale, "proj_down": down, "proj_up": up}
    return out | {
        "weight": weight,
        "weight_scale": scale.reshape(1, -1).expand(1, spec.out_features).contiguous(),
    }


def natural_weight(weight: torch.Tensor) -> torch.Tensor:
    """(N/128, K/64, 32, 128) tile-packed bytes as (N, K/2); natural ones as they are."""
    if weight.dim() == 2:
        return weight
    rows = weight.unflatten(-1, (4, GROUP // 2)).permute(
        0,
        2,
        3,
        1,
        4,
    )
    return rows.reshape(weight.shape[0] * TILE, weight.shape[1] * GROUP // 2)


def natural_rows(tiles: torch.Tensor) -> torch.Tensor:
    """(N/128, M, 128) tiles as (N, M)."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])
