"""GPTQ (Frantar et al. 2022): each column's rounding error is pushed into the columns not rounded yet."""

import torch

from ...kernels.dispatch import has_kernels
from ...kernels.gptq.search import FRACTIONS, NVFP4_FRACTIONS
from ...kernels.operator import nvfp4
from ...kernels.operator.codes import INT, NVFP4
from ...kernels.operator.quantizers import TINY, absmax_scale, code_range
from ...kernels.operator.transforms import hadamard, rotate, transform_activation
from ...kernels.target import target_of


def upper_factor(hessian: torch.Tensor, damp: float, noise: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Upper triangular C with H + max(damp mean(diag H), noise) I = C C^T, computed in place of `hessian` (k,
    k) fp32. noise: what fp32 may have left in H of larger moments that were taken out of it.

    From the Cholesky factor of the matrix with both axes reversed. Its inverse is the upper Cholesky factor
    of H^-1 that GPTQ needs, so one factorisation serves both GPTQ and the whitened SVD. Dead channels get a
    unit diagonal.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        return hessian.zero_().fill_diagonal_(1.0)
    added = (damp * mean).clamp(min=noise)
    diagonal.add_(added)
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        # fp32 noise of a nearly singular matrix; ten times the damping has always been enough.
        diagonal.add_(9 * added)
        lower = torch.linalg.cholesky(hessian.flip(0, 1))
    return lower.flip(0, 1)


def quantize(
    weight_t: torch.Tensor,
    factor: dict,
    bits: int,
    group: int,
    dtype: torch.dtype,
    block: int = 128,
    scales=None,
    grid: str = INT,
):
    """Codes (K, N) int8 and scales (G, N), in `dtype` or on the nvfp4 grid in fp32, of a folded weight.

    weight_t (K, N) fp32, the weight transposed; destroyed. factor: {(start, stop): upper_factor}, covering
    all K. Scales are set at the start of each group from the weights as updated so far, as `_searched`, or
    are those given, (G, N) in `dtype`.
    """
    k, n = weight_t.shape
    codes = torch.empty(k, n, dtype=torch.int8, device=weight_t.device)
    given = scales is not None
    if scales is None:
        held = torch.float32 if grid == NVFP4 else dtype
        scales = torch.empty(k // group, n, dtype=held, device=weight_t.device)
    round_block = _on_gpu if has_kernels(target_of(weight_t.device)) else _rows
    for (start, stop), c in sorted(factor.items()):
        for first in range(start, stop, block):
            last = min(first + block, stop)
            inverse = _inverse_rows(c, first - start, last - start)
            columns = weight_t[first:last]
            errors = torch.empty_like(columns)
            block_of = codes[first:last]
            round_block(columns, inverse, scales, block_of, errors, first, group, bits, given, grid)
            if last < stop:
                weight_t[last:stop].addmm_(inverse[:, last - first :].T, errors, alpha=-1)
    # What is below the range of a row's e4m3 numbers is rounded to one of them, or to 0.
    return codes, scales if grid == INT or given else nvfp4.stored(scales.T).T


def _rows(columns, inverse, scales, codes, errors, first, group, bits, given, grid):
    """One block row by row; see `kernels.gptq.launch.block`. columns are used up."""
    nearest = nvfp4.nearest if grid == NVFP4 else _to_code(bits)
    for j in range(len(columns)):
        if (first + j) % group == 0 or (j == 0 and given):
            g = (first + j) // group
            if not given:
                scales[g] = _searched(
                    columns[j : j + group], inverse.diagonal()[j : j + group], scales.dtype, bits, grid
                )
            scale = scales[g].float()
        column = columns[j]
        rounded = nearest(column / scale)
        codes[j] = rounded.to(torch.int8)
        torch.sub(column, rounded.mul_(scale), out=errors[j]).div_(inverse[j, j])
        columns[j + 1 :].addr_(inverse[j, j + 1 : len(columns)], errors[j], alpha=-1)


def _to_code(bits):
    """A function that rounds (N,) or (K, N) fp32, which it may use up, to integer codes."""
    low, top = code_range(bits)
    return lambda x: x.round_().clamp_(low, top)


def _searched(columns, diagonal, dtype, bits, grid):
    """Scales (N,) in `dtype` of a group of columns (group, N): the fraction of absmax that leaves the least
    error in the metric of the second moments, where an error of row k costs 1 / diagonal_k^2."""
    nearest, fractions, to_stored = _to_code(bits), FRACTIONS, lambda scale: scale.to(dtype)
    largest = absmax_scale(columns.T, bits, "channel").squeeze(1)
    if grid == NVFP4:
        nearest, fractions, to_stored = nvfp4.nearest, NVFP4_FRACTIONS, nvfp4.three_bits
        largest = columns.abs().amax(0).clamp(min=TINY) / nvfp4.TOP
    tiny, best = torch.finfo(dtype).tiny, None
    for fraction in fractions:
        scale = to_stored(largest * fraction).clamp(min=tiny)
        wide = scale.float()
        rounded = nearest(columns / wide).mul_(wide)
        error = rounded.sub_(columns).div_(diagonal[:, None]).square_().sum(0)
        if best is None:
            best = error, scale
        else:
            better = error < best[0]
            best = torch.where(better, error, best[0]), torch.where(better, scale, best[1])
    return best[1]


def _on_gpu(*args):
    from ...kernels.gptq.launch import block  # imports Triton, which a machine may not have

    block(*args)


def _inverse_rows(c, first, last):
    """Rows first..last of C^-1 from column `first` on: (last - first, k - first). Never the whole inverse in
    memory."""
    unit = torch.zeros(last - first, c.shape[0] - first, device=c.device)
    unit.fill_diagonal_(1.0)
    return torch.linalg.solve_triangular(c[first:, first:], unit, upper=True, left=False)


def transformed_moments(
    moments: torch.Tensor, smooth: torch.Tensor | None, rotation: int = 0, factors=None
) -> torch.Tensor:
    """T H T^T, (k, k) fp32, of second moments H of the raw input: those of the transformed one, T as in
    `transform_activation`."""
    if factors is not None:
        for _ in range(2):
            moments = transform_activation(moments, smooth, rotation, factors=factors).T
        return moments.contiguous()
    # Both sides where they lie: half the time of two passes with a transposed copy behind each.
    if smooth is not None:
        moments = (moments / smooth).div_(smooth[:, None])
    if not rotation:
        return moments
    blocks = rotate(moments, rotation).unflatten(0, (-1, rotation))
    return (hadamard(rotation, moments.device) @ blocks).flatten(0, 1)
