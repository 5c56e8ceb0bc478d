"""The operator by torch's own int8 product, for CPUs and for CUDA without Triton: the integer sums are exact,
and one pass scales them.

A row of x and its scale make the codes; weights are codes of one scale a row. Layers without quantized
activations take each token as three digits of 8 bits, x = s (c1 + c2 / 254 + c3 / 254^2), which is fp32's own
rounding. They have few rows, and are bound by reading the weights.
"""

import torch

from ..operator.quantizers import absmax_scale, quantize, quantize_activation
from ..operator.transforms import transform_activation

# On a CPU, so that what lies between two steps stays in its caches: 256 rows are as fast as 1024 in the
# product (3.9 and 3.8 ms a 256 rows of 3072 x 3072), and 96 half as fast.
ROWS, CHANNELS = 256, 3072
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_ROWS = 32  # of CUDA's product, which refuses 16 and less
DIGITS = 3  # of a token that is not quantized
_NEXT = 254.0  # a rounded digit is off by half a step at most: 127 steps of the next one


def quant_linear(x, spec, tensors):
    """x (M, K) in fp32, bf16 or fp16 -> y (M, N) in that dtype. Arguments as in `naive.quant_linear`; no part
    has scales of groups, nor one for a whole tensor of activations.

    Everything but the codes and the stored tensors is fp32. Weights of less than 8 bits are unpacked at each
    call: `LinearSpec.as_int8` is the layer without that. Nothing flows back through codes.
    """
    if spec.order:
        x = x.index_select(1, tensors["channel_order"])
    split = list(spec.split(tensors))
    weights = [_codes(packed, part) for part, packed, _, _ in split]
    scales = [scale.float() for _, _, scale, _ in split]
    smooth = [None if factor is None else factor.float() for *_, factor in split]
    of_parts = list(zip(spec.parts, smooth, spec.factors(tensors), spec.downs(tensors), strict=True))
    bias = tensors["bias"].float()[None] if spec.bias else None
    down, up = (tensors[name].float() for name in ("proj_down", "proj_up")) if spec.rank else (None, None)
    y = x.new_empty(x.shape[0], spec.out_features)
    for rows in _chunks(x, x.shape[0], ROWS):
        here = x[rows]
        inputs = [_input(here[:, part.start : part.stop], part, *more) for part, *more in of_parts]
        low = _low(here, spec, down) if spec.rank else None
        for columns in _chunks(x, spec.out_features, CHANNELS):
            out = None if bias is None else bias[:, columns]
            for (codes, scale), weight, row_scale in zip(inputs, weights, scales, strict=True):
                scaled, of_rows = _product(codes, scale, weight[columns], len(here)), row_scale[:, columns]
                out = scaled * of_rows if out is None else torch.addcmul(out, scaled, of_rows)
            y[rows, columns] = out if low is None else torch.addmm(out, low, up[columns].T)
    return y


def _low(x, spec, down):
    """x D of each part, side by side (M, parts R), fp32."""
    return torch.cat([x[:, p.start : p.stop].float() @ down[p.start : p.stop] for p in spec.parts], 1)


def _chunks(x, count, size):
    # A graph of torch.compile's has no use for chunks, a GPU no cache that they would fit into.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, count)]
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _codes(packed, part):
    return (packed if part.weight.bits == 8 else part.weight.unpack(packed)).to(torch.int8)


def _input(x, part, smooth, factors, down):
    """Codes (M, w) int8 and scales (M, 1) fp32 of a part's x (M, w); without quantized activations three
    of each, one below the other."""
    if part.activation is not None:
        codes, scale = quantize_activation(x, part, smooth, factors, down)
        return codes.view(torch.int8), scale
    rest = transform_activation(x.float(), smooth, part.rotation, factors=factors)
    scale, digits, scales = absmax_scale(rest, 8, "token"), [], []
    for _ in range(DIGITS):
        digits.append(quantize(rest, scale, 8, "token"))
        scales.append(scale)
        rest, scale = rest - digits[-1] * scale, scale / _NEXT
    return torch.cat(digits), torch.cat(scales)


def _product(codes, scale, weight, rows):
    """(rows, N) fp32: exact sums of codes (rows or three times as many, w) and weight (N, w), times the
    scales of codes; the digits of a token are added up."""
    count = codes.shape[0]
    if codes.device.type == "cuda" and count < LEAST_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, LEAST_ROWS - count))
    scaled = torch._int_mm(codes, weight.T)[:count] * scale
    return scaled if count == rows else scaled.view(-1, rows, scaled.shape[1]).sum(0)
