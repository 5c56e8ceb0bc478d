"""Transforms of the in-channels. Every one is applied to x at run time and folded, inverted, into W at
quantization."""

from functools import lru_cache

import torch

_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@lru_cache(maxsize=16)
def _signs(size: int) -> torch.Tensor:
    if size < 2 or size & (size - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two, found {size}")
    h = torch.ones(1, 1)
    if size.bit_length() % 2 == 0:  # an odd power of two: one Sylvester factor
        h = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while h.shape[0] < size:
        h = torch.kron(h, torch.tensor(_H4, dtype=torch.float32))
    return h


def hadamard(size: int, device=None, dtype=torch.float32) -> torch.Tensor:
    """The orthonormal, symmetric Hadamard matrix (size, size).

    Kronecker power of the regular H4 as in comfy-kitchen's convrot_w4a4 (ConvRot), so no channel of a
    constant vector takes all of its energy; odd powers of two have one Sylvester factor in front.
    """
    return _signs(size).to(device=device, dtype=dtype) / size**0.5


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """x (..., K) times blockdiag(H, H, ...) with blocks of `size` channels. Its own inverse. `size` 0: x
    itself."""
    if not size:
        return x
    if x.shape[-1] % size:
        raise ValueError(f"rotation blocks of {size} channels do not divide K = {x.shape[-1]}")
    return (x.unflatten(-1, (-1, size)) @ hadamard(size, x.device, x.dtype)).flatten(-2)


def rotation_size(width: int, limit: int) -> int:
    """The largest power of two that divides `width` and is at most `limit`."""
    return min(width & -width, 1 << (limit.bit_length() - 1)) if limit else 0


def channels_last(x: torch.Tensor, spatial: int) -> torch.Tensor:
    """x as a linear layer takes it, where its channels stand in front of `spatial` dimensions: a view."""
    return x.movedim(-1 - spatial, -1) if spatial else x


def channels_first(x: torch.Tensor, spatial: int) -> torch.Tensor:
    """The inverse of `channels_last`."""
    return x.movedim(-1, -1 - spatial) if spatial else x


def kronecker(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """P1^T X P2 of each slice X (p1, p2) of the channels of x (..., K), in its dtype. left (1 or S, p1, q1),
    right (1 or S, p2, q2)."""
    slices = x.unflatten(-1, (-1, left.shape[-2], right.shape[-2]))
    return (left.mT.to(x.dtype) @ slices @ right.to(x.dtype)).flatten(-3)


def transform_activation(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    rotation: int,
    shift: float = 0.0,
    factors=None,
    principal: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """T x of a part: shift, divide by the smoothing factor (K,), take out what `principal` carries, rotate or
    apply the Kronecker `factors` (left, right). x (..., K), any float dtype, same dtype out. principal:
    (h (..., P), back (K, P)) of `carried`."""
    if shift:
        x = x + shift
    if smooth is not None:
        x = x / smooth.to(x.dtype)
    if principal is not None:
        x = x - principal[0].to(x.dtype) @ principal[1].to(x.dtype).mT
    return rotate(x, rotation) if factors is None else kronecker(x, *factors)


def carried(
    x: torch.Tensor, down: torch.Tensor, smooth: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h (M, P), back (K, P)): what principal components take out of x / s is h back^T (DiRotQ,
    arXiv 2605.16732).

    x (M, K) in its own dtype, in which h comes, as in the low-rank branch that carries it to the output; down
    (K, P) 16 bit = diag(1/s) V, the columns of V orthonormal; smooth (K,) or None. back = V in the dtype of
    down.
    """
    back = down if smooth is None else (down.float() * smooth.float()[:, None]).to(down.dtype)
    wide = x.float() if x.dtype == torch.float16 else x  # whose sums may leave fp16
    return wide @ down.to(wide.dtype), back


def to_raw(vectors: torch.Tensor, smooth: torch.Tensor | None, rotation: int) -> torch.Tensor:
    """Columns (K, R) of a matrix over Tx -> those over raw x that give the same product: diag(1/s) R v."""
    vectors = rotate(vectors.T, rotation).T
    return vectors if smooth is None else vectors / smooth[:, None]


def to_transformed(columns: torch.Tensor, smooth: torch.Tensor | None, rotation: int) -> torch.Tensor:
    """The inverse of `to_raw`: R diag(s) d, fp32."""
    columns = columns.float() if smooth is None else columns.float() * smooth.float()[:, None]
    return rotate(columns.T, rotation).T


def fold_weight(
    weight: torch.Tensor, smooth: torch.Tensor | None, rotation: int, factors=None
) -> torch.Tensor:
    """W T^-1, so that (W T^-1)(T x) = W x. weight (N, K) -> (N, K). Factors are inverted in fp64: they need
    not be orthogonal."""
    if smooth is not None:
        weight = weight * smooth.to(weight.dtype)
    if factors is None:
        return rotate(weight, rotation)
    return kronecker(weight, *(torch.linalg.inv(p.double()).mT.to(weight.dtype) for p in factors))


def unfold_weight(
    weight: torch.Tensor, smooth: torch.Tensor | None, rotation: int, factors=None
) -> torch.Tensor:
    """The inverse of `fold_weight`: a weight of the transformed input back to the raw input."""
    weight = rotate(weight, rotation) if factors is None else kronecker(weight, *(p.mT for p in factors))
    return weight if smooth is None else weight / smooth.to(weight.dtype)
