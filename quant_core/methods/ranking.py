"""What error candidates of SVDQuant would leave, roughly and many at a time: the order to fit them in."""

import torch

from ...kernels.operator.quantizers import dequantize
from ...kernels.operator.transforms import rotate, transform_activation
from ..layer.lowrank import truncated_chunks

BATCH = 32 * 2**20  # weights of all candidates of a batch: 128 MB in fp32, and three times that in passing


def at_a_time(weight: torch.Tensor) -> int:
    """How many candidates of a weight make a batch: one at a time stays in a CPU's caches, on a card a batch
    is as many launches as one."""
    return 1 if weight.device.type == "cpu" else max(1, BATCH // weight.numel())


def rough_errors(
    fit,
    spec,
    smooth: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    directions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Energies (C,) fp64 of the output's error of one PartSpec at C smoothings, with a plain low rank and
    rounding to nearest.

    fit: the PartFit, for its rank, tokens x (T, K), dtype and scales. smooth (C, K) fp32; weight (n, K) fp32,
    some of the rows; y (T, n) fp32, their exact output; directions (C, K, P) fp32: principal components of
    each x / s, orthonormal. The low rank takes one step of its iteration: the order of 26 candidates is that
    of three steps but for neighbours that differ by a thousandth.
    """
    s, rank = smooth[:, None, :], min(fit.rank, *weight.shape)
    rest = weight * s
    wrong = y.expand(len(smooth), -1, -1)
    carried = None
    if directions is not None:
        rank -= directions.shape[-1]
        carried, up = (fit.x / s) @ directions, rest @ directions
        rest = torch.baddbmm(rest, up, directions.mT, alpha=-1)
        wrong = torch.baddbmm(wrong, carried, up.mT, alpha=-1)
    rest = rotate(rest, spec.rotation)
    if rank:
        v, u = truncated_chunks([(slice(0, len(weight)), rest)], rank, iterations=1)
        rest = torch.baddbmm(rest, u, v.mT, alpha=-1)
        down = rotate(v.mT, spec.rotation).mT / s.mT
        wrong = torch.baddbmm(wrong, fit.x @ down, u.mT, alpha=-1)
    codes, scales = spec.weight.rounded(rest.flatten(0, 1), fit.dtype, fit.scale_of)
    rounded = dequantize(codes, scales.float(), spec.weight.granularity, spec.weight.group).view_as(rest)
    tokens = _rounded_tokens(fit.x, spec, s, None if carried is None else (carried, directions))
    return torch.baddbmm(wrong, tokens, rounded.mT, alpha=-1).double().square().sum((1, 2))


def _rounded_tokens(x, spec, s, principal=None):
    """(C, T, K) of x (T, K) as the product sees them, without what the bias takes back of a shift."""
    act = spec.activation
    tx = transform_activation(x, s, spec.rotation, act.shift, principal=principal).flatten(0, 1)
    codes, scale = act.rounded(tx)
    tx = dequantize(codes, scale, act.granularity, act.group).view(len(s), *x.shape)
    return tx - act.shift / s if act.shift else tx
