"""Weight-only layers with zero points (AWQ) as layers of the one operator, which has none: the offset of a
group is a low rank."""

import torch

from ..layer.linear import QuantizedLayer


def without_zero_points(packed, scale, zero, group: int, dtype: torch.dtype):
    """W = codes * scale + zero, codes 0..15, as (codes - 8) * scale + offset with offset = zero + 8 * scale.

    packed: int8 (N, K / 2), two codes a byte, the even channel low. scale, zero: (N, G), G = K / group;
    `zero` is added as it is (-scale times the zero point). dtype: 16 bit, of the low rank. Returns (weight
    int8 (N, K / 2), weight_scale (G, N), proj_down (K, R), proj_up (N, R)): the indicators of the groups and
    their offsets. R is G where every offset is exact in `dtype`, else 2 G with zero and 8 scale apart, so
    that nothing is rounded; the last two are None where all offsets are 0 (`offset_columns`).
    """
    weight, weight_scale, columns = signed(packed), scale.T.contiguous(), offset_columns(scale, zero, dtype)
    if not columns:
        return weight, weight_scale, None, None
    up = (
        _offset(scale, zero).to(dtype)
        if columns == 1
        else torch.cat([zero.to(dtype), (8 * scale.float()).to(dtype)], 1)
    )
    return (
        weight,
        weight_scale,
        indicators(scale.shape[1] * group, group, dtype).repeat(1, columns),
        up.contiguous(),
    )


def signed(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes 0..15, int8 (N, K / 2), to packed codes - 8 in two's complement, and back: the top bit of
    each changes."""
    return packed ^ -0x78


def zeros_of(weight_scale, proj_down, proj_up, group: int) -> torch.Tensor:
    """The zeros (N, G), fp32, of a layer whose low rank is the offset of its groups; -8 scale without a low
    rank (both None).

    weight_scale: (G, N). Raises ValueError where the low rank is no such offset.
    """
    zero = -8 * weight_scale.T.float()
    if proj_down is None:
        return zero
    groups, rank = len(weight_scale), proj_down.shape[1]
    wanted = indicators(len(proj_down), group, proj_down.dtype)
    if rank not in (groups, 2 * groups) or not torch.equal(proj_down, wanted.repeat(1, rank // groups)):
        raise ValueError("its low rank is no offset for each group of in-channels")
    parts = proj_up.float().split(groups, 1)
    # Of two columns, (zero, 8 scale), the second and -8 scale cancel.
    return parts[0] + zero if len(parts) == 1 else parts[0] + (parts[1] + zero)


def offsets_only(layer: QuantizedLayer) -> bool:
    """Whether the low rank of a weight-only layer is nothing but the offset of its groups."""
    tensors = layer.tensors
    try:
        zeros_of(
            tensors["weight_scale"],
            tensors.get("proj_down"),
            tensors.get("proj_up"),
            layer.spec.parts[0].weight.group,
        )
    except ValueError:
        return False
    return True


def offset_columns(scale, zero, dtype) -> int:
    """Columns of the low rank for each group: 0 where every offset is 0, 1 where every one is exact in
    `dtype`, else 2.

    By Sterbenz' lemma the sum is exact for zero points of 4 to 16; nunchaku's are 7.
    """
    whole = _offset(scale, zero)
    if not whole.any():
        return 0
    return 1 if torch.equal(whole.to(dtype).double(), whole) else 2


def _offset(scale, zero) -> torch.Tensor:
    """zero + 8 scale in fp64: exact for any two 16-bit values within 2^40 of each other."""
    return zero.double() + 8 * scale.double()


def indicators(k: int, group: int, dtype) -> torch.Tensor:
    """(K, K / group): 1 where the in-channel is of the group."""
    return torch.eye(k // group, dtype=dtype).repeat_interleave(group, 0)
