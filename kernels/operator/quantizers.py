"""Uniform symmetric quantizers. Range and rounding are comfy-kitchen's: signed codes in [-qmax, qmax], scale
= absmax / qmax.

One bit is the sign: codes -1 and 1, no zero (RobuQ's A1; x >= 0 gives 1).
"""

import torch

from .transforms import carried, transform_activation

GROUP = 64
TINY = 1e-10


def code_range(bits: int, unsigned: bool = False) -> tuple[int, int]:
    """The clamp range of codes: (-7, 7) at 4 bits (-8 can be stored but is never emitted), (0, 15) unsigned;
    (-1, 1) at 1 bit."""
    top = 2**bits - 1 if unsigned else max(1, 2 ** (bits - 1) - 1)
    return (0 if unsigned else -top), top


def grouped(x: torch.Tensor, granularity: str, group: int = GROUP) -> torch.Tensor:
    """A view of (rows, K) as (rows or 1, groups, width), one scale for each of the first two axes."""
    if granularity == "group":
        return x.unflatten(-1, (-1, group))
    if granularity == "tensor":
        return x.reshape(1, 1, -1)
    return x.unsqueeze(-2)  # one scale a row


def absmax_scale(
    x: torch.Tensor,
    bits: int,
    granularity: str,
    group: int = GROUP,
    unsigned: bool = False,
    clip: float = 1.0,
) -> torch.Tensor:
    """Scales (rows, groups) of x (rows, K), fp32: clip * absmax / largest code. Rows is 1 for granularity
    "tensor"."""
    values = grouped(x, granularity, group)
    # No copy of the magnitudes: 4.7 ms for 9.4 M values in groups on a CPU, 22 with one.
    absmax = torch.maximum(values.amax(-1), -values.amin(-1)).clamp(min=TINY).float()
    return absmax * clip / code_range(bits, unsigned)[1]


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    granularity: str,
    group: int = GROUP,
    unsigned: bool = False,
):
    """Codes (rows, K) in int8 (uint8 if unsigned) of x (rows, K) at scales (rows, groups). Rounds half to
    even.

    At 1 bit the codes are the signs of x, whatever the scale: what underflows in the division keeps its sign.
    """
    if bits == 1:
        return torch.where(x >= 0, 1, -1).to(torch.int8)
    low, top = code_range(bits, unsigned)
    codes = (grouped(x, granularity, group) / scale.unsqueeze(-1)).round_().clamp_(low, top)
    return codes.reshape(x.shape).to(torch.uint8 if unsigned else torch.int8)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, granularity: str, group: int = GROUP
) -> torch.Tensor:
    """codes (rows, K) times scales (rows, groups), in the dtype of the scales."""
    return (grouped(codes.to(scale.dtype), granularity, group) * scale.unsqueeze(-1)).reshape(codes.shape)


def best_clip_scale(
    weight: torch.Tensor, bits: int, granularity: str, group: int = GROUP, steps: int = 16
) -> torch.Tensor:
    """Scales (rows, groups) that minimise the squared error of the weight, searched from 1.0 to 0.6 of
    absmax.

    For weight-only layers; with quantized activations the low-rank branch and GPTQ make it a loss (H-SVD
    ablations).
    """
    full = absmax_scale(weight, bits, granularity, group)
    best, best_error = full, torch.full_like(full, torch.inf)
    for factor in torch.linspace(1.0, 0.6, steps).tolist():
        scale = full * factor
        rest = (
            dequantize(quantize(weight, scale, bits, granularity, group), scale, granularity, group) - weight
        )
        error = grouped(rest, granularity, group).square().sum(-1)
        best, best_error = torch.where(error < best_error, scale, best), torch.minimum(error, best_error)
    return best


def ternary_scale(weight: torch.Tensor) -> torch.Tensor:
    """Scales (rows, 1), fp32, at which codes {-1, 0, 1} have the least squared error on weight (rows, K): the
    exact optimum of each row.

    With the k largest magnitudes coded, the best scale is their mean S_k / k and the error falls by S_k^2 /
    k: one sort and one cumulative sum find the best k. What is above half of that scale are those k (Lloyd's
    condition), so `quantize` at 2 bits gives the codes. 7.2 dB on a Gaussian, where k is 54 % and the scale
    1.22 sigma; with the mean magnitude as the scale (BitNet) 5.8 dB.
    """
    sums = weight.float().abs().sort(-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, weight.shape[-1] + 1, device=weight.device)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    return sums.gather(-1, best) / (best + 1)


def quantize_activation(x, part, smooth=None, factors=None, down=None):
    """Q(Tx) of one part. x (M, part.width) float -> codes (M, width) int8 or uint8, scale (M or 1, groups)
    fp32. down: the part's rows of proj_down, (width, R), which principal components need."""
    spec = part.activation
    principal = carried(x, down[:, : part.principal], smooth) if part.principal else None
    tx = transform_activation(x.float(), smooth, part.rotation, spec.shift, factors, principal)
    return spec.rounded(tx, x.dtype)
