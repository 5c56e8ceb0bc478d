"""Block-scaled fp4 in exact arithmetic: the executable specification. Slow; tests compare the kernels with
it.

mxfp4 follows the OCP Microscaling Formats (MX) Specification v1.0, section 6.3: the scale of 32 values is two
to the exponent of the largest less the largest exponent of an element, which is 2 for e2m1. nvfp4 is
NVIDIA's, with the roundings of comfy-kitchen's `quantize_nvfp4`: the scale of 16 values is absmax / 6,
divided by a fp32 scale of the tensor and rounded to e4m3; the values are divided by the product of the two
scales. The tensor's scale lets the largest block have the scale 448, the largest e4m3 number.

Both round to the nearest e2m1 value, ties to the even code, and saturate at 6. The scale of a block with a
value that is not finite is NaN.
"""

from itertools import pairwise

import torch

from ..operator.packing import pack, unpack
from ..operator.quantizers import TINY

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 to 15 are their negatives
E2M1_MAX, E4M3_MAX = 6.0, 448.0


def encode_e2m1(x):
    """x, any float dtype -> codes 0..15, uint8. That of NaN has no meaning."""
    edges = torch.tensor([(a + b) / 2 for a, b in pairwise(VALUES)], dtype=torch.float64, device=x.device)
    magnitude = x.double().abs().unsqueeze(-1)
    # They differ on an edge, by one.
    above, reached = (
        (magnitude > edges).sum(-1),
        (magnitude >= edges).sum(-1),
    )
    code = torch.where(above % 2 == 0, above, reached)
    return (code + 8 * torch.signbit(x)).to(torch.uint8)


def decode_e2m1(codes):
    """Codes 0..15 -> float64."""
    values = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float64, device=codes.device)
    return values[codes.long()]


def block_of(scales) -> int:
    """Channels a scale, by its dtype: 16 (nvfp4) or 32 (mxfp4)."""
    return 16 if scales.dtype == torch.float8_e4m3fn else 32


def tensor_scale(x):
    """The nvfp4 scale of a whole tensor, fp32 ()."""
    return x.float().abs().amax().clamp(min=TINY) / (E2M1_MAX * E4M3_MAX)


def token_scale(x):
    """A scale for each row in place of the tensor's, (rows, 1) fp32: a NaN or an outlier stays in its
    token."""
    return x.float().abs().amax(-1, keepdim=True).clamp(min=TINY) / (E2M1_MAX * E4M3_MAX)


def quantize_nvfp4(x, scale=None):
    """x (rows, K), scale fp32 (), (1,) or (rows, 1), `tensor_scale(x)` by default
    -> codes (rows, K / 2) uint8, scales (rows, K / 16) float8_e4m3fn, the scale."""
    scale = tensor_scale(x) if scale is None else scale
    blocks = x.float().unflatten(-1, (-1, 16))
    absmax = blocks.abs().amax(-1)
    scales = torch.where(absmax.isfinite(), (absmax / E2M1_MAX / scale).clamp(max=E4M3_MAX), torch.nan).to(
        torch.float8_e4m3fn
    )
    divisor = (scales.float() * scale).unsqueeze(-1)
    codes = torch.where(divisor == 0, 0, encode_e2m1(blocks / divisor))
    return pack(codes.flatten(-2), 4).view(torch.uint8), scales, scale


def quantize_mxfp4(x):
    """x (rows, K) -> codes (rows, K / 2) uint8, scales (rows, K / 32) uint8: exponents + 127, 255 for NaN."""
    blocks = x.float().unflatten(-1, (-1, 32))
    absmax = blocks.abs().amax(-1)
    exponent = torch.frexp(absmax.double())[1] - 3  # floor(log2) - 2
    scales = torch.where(absmax == 0, 0, (exponent + 127).clamp(min=0))
    scales = torch.where(absmax.isfinite(), scales, 255).to(torch.uint8)
    codes = encode_e2m1(blocks.double() / decode_scales(scales).unsqueeze(-1))
    return pack(codes.flatten(-2), 4).view(torch.uint8), scales


def decode_scales(scales):
    """Scales of either format -> float64."""
    if scales.dtype == torch.float8_e4m3fn:
        return scales.double()
    value = torch.ldexp(torch.ones_like(scales, dtype=torch.float64), scales.long() - 127)
    return torch.where(scales == 255, torch.nan, value)


def dequantize(codes, scales, scale=None):
    """codes (rows, K / 2), scales (rows, K / block), scale (), (1,), (rows, 1) or None -> (rows, K)
    float64."""
    values = decode_e2m1(unpack(codes.view(torch.int8), 4, unsigned=True)).unflatten(
        -1, (-1, block_of(scales))
    )
    values = (values * decode_scales(scales).unsqueeze(-1)).flatten(-2)
    return values if scale is None else values * scale.double()


def linear(x, codes, scales, scale=None, low=None, up=None, bias=None):
    """y = x w^T + low up^T + bias in float64. x (M, K), as dequantized; w (N, K) by its codes and scales,
    `scale` one or (N, 1); low (M, R) and up (N, R), or None; bias (N,) or None."""
    y = x.double() @ dequantize(codes, scales, scale).T
    if low is not None:
        y += low.double() @ up.double().T
    return y if bias is None else y + bias.double()
