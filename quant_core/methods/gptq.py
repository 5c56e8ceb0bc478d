"""GPTQ (Frantar et al. 2022): each column's rounding error is pushed into the columns not rounded yet."""

import torch

from ...kernels.dispatch import has_kernels
from ...kernels.operator.quantizers import absmax_scale, code_range
from ...kernels.operator.transforms import transform_activation
from ...kernels.target import target_of


def upper_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper triangular C with H + damp mean(diag H) I = C C^T, computed in place of `hessian` (k, k) fp32.

    From the Cholesky factor of the matrix with both axes reversed. Its inverse is the upper Cholesky factor
    of H^-1 that GPTQ needs, so one factorisation serves both GPTQ and the whitened SVD. Dead channels get a
    unit diagonal.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        return hessian.zero_().fill_diagonal_(1.0)
    diagonal.add_(damp * mean)
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        # fp32 noise of a nearly singular matrix; ten times the damping has always been enough.
        diagonal.add_(9 * damp * mean)
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
):
    """Codes (K, N) int8 and scales (G, N) in `dtype` of a folded weight.

    weight_t (K, N) fp32, the weight transposed; destroyed. factor: {(start, stop): upper_factor}, covering
    all K. Scales are set at the start of each group from the weights as updated so far, or are those given,
    (G, N) in `dtype`.
    """
    k, n = weight_t.shape
    codes = torch.empty(k, n, dtype=torch.int8, device=weight_t.device)
    given = scales is not None
    if scales is None:
        scales = torch.empty(k // group, n, dtype=dtype, device=weight_t.device)
    round_block = _on_gpu if has_kernels(target_of(weight_t.device)) else _rows
    for (start, stop), c in sorted(factor.items()):
        for first in range(start, stop, block):
            last = min(first + block, stop)
            inverse = _inverse_rows(c, first - start, last - start)
            columns = weight_t[first:last]
            errors = torch.empty_like(columns)
            round_block(columns, inverse, scales, codes[first:last], errors, first, group, bits, given)
            if last < stop:
                weight_t[last:stop].addmm_(inverse[:, last - first :].T, errors, alpha=-1)
    return codes, scales


def _rows(columns, inverse, scales, codes, errors, first, group, bits, given):
    """One block row by row; see `kernels.gptq.launch.block`. columns are used up."""
    low, top = code_range(bits)
    for j in range(len(columns)):
        if (first + j) % group == 0 or (j == 0 and given):
            g = (first + j) // group
            if not given:
                scale = absmax_scale(columns[j : j + group].T, bits, "channel").squeeze(1).to(scales.dtype)
                scales[g] = scale.clamp(min=torch.finfo(scales.dtype).tiny)
            scale = scales[g].float()
        column = columns[j]
        rounded = (column / scale).round_().clamp_(low, top)
        codes[j] = rounded.to(torch.int8)
        torch.sub(column, rounded.mul_(scale), out=errors[j]).div_(inverse[j, j])
        columns[j + 1 :].addr_(inverse[j, j + 1 : len(columns)], errors[j], alpha=-1)


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
    for _ in range(2):
        moments = transform_activation(moments, smooth, rotation, factors=factors).T
    return moments.contiguous()
