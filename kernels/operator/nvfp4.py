"""The nvfp4 grid in whole numbers: e2m1 values doubled, so that a product of codes is an integer as on the
other grids, and scales that are half of what comfy-kitchen multiplies e2m1 values by.

Both factors of two are exact: code times scale is comfy-kitchen's value times its two scales
(`quantize_nvfp4`, whose roundings these are; `kernels.fp4.naive` has them in exact arithmetic). A zero has no
sign here.
"""

import torch

from .packing import pack, unpack
from .quantizers import TINY, grouped

GROUP = 16  # channels that share a scale in e4m3
DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)  # of e2m1 codes 0 to 7; 8 to 15 are their negatives
TOP = DOUBLED[-1]
SCALE_TOP = 448.0  # the largest e4m3 number
SCALE_TINY = 2.0**-9  # the smallest above 0
EITHER_TOP = 256.0  # the largest of which e4m3 has one and a half
_MANTISSA = 3  # bits of e4m3


def nearest(x: torch.Tensor) -> torch.Tensor:
    """x, fp32 of any shape, to the nearest of the doubled values; ties to the even e2m1 code, NaN stays."""
    x = x.clamp(-TOP, TOP)
    # Whole numbers up to 4, even ones up to 8, then 12.
    step = 1.0 + (x.abs() >= 4) + 2.0 * (x.abs() >= 8)
    return (x / step).round_().mul_(step)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes (rows, K) int8, doubled e2m1 values, of x (rows, K) fp32 at scales (rows, K / 16) fp32; 0 where a
    scale is."""
    divisor = scale.masked_fill(scale == 0, torch.inf).unsqueeze(-1)
    return nearest(grouped(x, "group", GROUP) / divisor).to(torch.int8).reshape(x.shape)


def group_absmax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each group, (rows, K / 16), of x (rows, K)."""
    return grouped(x, "group", GROUP).abs().amax(-1)


def token_scale(absmax: torch.Tensor, either: bool = False) -> torch.Tensor:
    """(rows, 1) fp32 of the `group_absmax` of activations: what lets the largest group of a row have a scale
    of 448, and with `either` of 256 for a 6, so that 384 is there for a 4."""
    largest = absmax.amax(-1, keepdim=True).clamp(min=TINY)
    return largest / (6 * (EITHER_TOP if either else SCALE_TOP))


def largest(x: torch.Tensor) -> torch.Tensor:
    """() fp32, the largest magnitude of x in one pass and without a copy; NaN where x has one, 0 of no
    values."""
    return torch.linalg.vector_norm(x, torch.inf) if x.numel() else x.new_zeros(())


def tensor_scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """() fp32: what lets the largest group of a whole tensor x have a scale of 448, of the largest magnitude
    in it.

    ComfyUI divides in the dtype of x, and so does this in bf16, where that moves all scales by up to 1/256.
    In fp16 it is fp32 here: the quotient of anything below 0.16 has less than fp16's 11 bits, and below
    8e-5 it would be 0. A tensor of zeros has the smallest scale and not 0, which gives ComfyUI NaN.
    """
    scale = largest.float() / (6 * SCALE_TOP)
    return (scale.bfloat16().float() if dtype == torch.bfloat16 else scale).clamp(min=TINY)


def block_scales(
    x: torch.Tensor, absmax: torch.Tensor, t: torch.Tensor, either: bool = False
) -> torch.Tensor:
    """Scales (rows, K / 16) fp32 of activations x (rows, K) fp32 with this `group_absmax`: half of
    e4m3(absmax / 6 / t) t for outer scales t, (rows, 1) or (), fp32. NaN or infinity makes its own group NaN.

    either: e4m3(absmax / 4 / t) where that leaves the smaller squared error of a group ("Four over Six",
    arXiv 2512.02010).
    """

    def of(largest):
        scale = (absmax / largest / t).clamp(max=SCALE_TOP)
        scale = torch.where(absmax.isfinite(), scale, torch.nan).to(torch.float8_e4m3fn)
        return scale.float() * t / 2

    return _better(x, of(6), of(4)) if either else of(6)


def stored(scale: torch.Tensor) -> torch.Tensor:
    """Scales (rows, groups) fp32 of a weight to what `split` keeps of them exactly: e4m3 numbers times a
    power of two for each row."""
    e4m3, outer = split(scale)
    return join(e4m3, outer)


def split(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 (rows, groups), fp32 (rows,)) whose product is twice the scales (rows, groups) fp32, rounded.

    The second is the power of two that brings the largest of a row to between 256 and 448, the top of e4m3.
    Of a power of two nothing is rounded, so that scales which have been stored once stay what they are.
    """
    wide = three_bits(2 * scale.float())
    outer = power_below(wide.amax(-1))
    return (wide / outer[..., None]).to(torch.float8_e4m3fn), outer


def power_below(largest: torch.Tensor) -> torch.Tensor:
    """The power of two that divides the largest of scales, fp32 of any shape, to between 240 and 448."""
    largest = largest.clamp(min=TINY**2)
    exponent = torch.frexp(largest)[1] - 9
    # 480 and 512 - 32 do not exist in e4m3: what has the mantissa 1.875 takes half of it.
    exponent = exponent + (torch.ldexp(largest, -exponent) > SCALE_TOP)
    return torch.ldexp(torch.ones_like(largest), exponent)


def join(e4m3: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """The inverse of `split`: scales (rows, groups) fp32 of doubled codes."""
    return e4m3.float() * outer.float()[..., None] / 2


def under(scale: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """Scales, fp32 of any shape, to the nearest e4m3 numbers times half of outer (), a power of two; the
    smallest such number in place of 0, by which GPTQ could not divide."""
    e4m3 = (2 * scale / outer).clamp(max=SCALE_TOP).to(torch.float8_e4m3fn).float()
    return e4m3.clamp(min=SCALE_TINY) * outer / 2


def four_over_six(weight: torch.Tensor, outer: torch.Tensor | None = None) -> torch.Tensor:
    """Scales (rows, K / 16) fp32 of weight (rows, K) fp32: of those that bring the largest of 16 weights to 6
    and to 4 the one with the smaller squared error ("Four over Six", arXiv 2512.02010).

    The step from 4 to 6 is the widest of e2m1; a group with many large weights does better without it. outer
    (): the power of two above the scales of all rows, at least a quarter of the largest weight over 448;
    None: one for each row.
    """
    absmax = group_absmax(weight)
    # Rounded together: the power of two of a row that holds the larger ones holds the smaller ones as
    # exactly.
    both = torch.cat([absmax / 12, absmax / 8], -1)
    held = stored(both) if outer is None else under(both, outer)
    return _better(weight, *held.tensor_split(2, -1))


def _better(x, six, four):
    """Of two scales (rows, K / 16) of x (rows, K) that with the smaller squared error, `six` of equals."""
    values = grouped(x, "group", GROUP)
    errors = [
        (quantize(x, scale).view_as(values) * scale.unsqueeze(-1) - values).square_().sum(-1)
        for scale in (six, four)
    ]
    return torch.where(errors[1] < errors[0], four, six)


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Doubled values (..., K) int8 -> e2m1 codes, two a byte, int8 (..., K / 2); the even channel is the low
    nibble."""
    table = torch.zeros(2 * TOP + 1, dtype=torch.uint8)
    for code, value in enumerate(DOUBLED):
        table[value], table[-value] = code, code + 8 * (value > 0)
    return pack(table.to(codes.device)[codes.long()], 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_e2m1`: int8 (..., B) -> doubled values (..., 2 B) int8; both zeros are 0."""
    table = torch.tensor([*DOUBLED, *(-value for value in DOUBLED)], dtype=torch.int8, device=packed.device)
    return table[unpack(packed, 4, unsigned=True).long()]


def three_bits(scale):
    """Scales, fp32 of any shape, to the nearest with a mantissa of e4m3 and any exponent; ties to even."""
    mantissa, exponent = torch.frexp(scale)
    step = 2.0 ** (_MANTISSA + 1)
    return torch.ldexp((mantissa * step).round_() / step, exponent)
