"""The operator in plain PyTorch: quantize and dequantize x, one matrix product a part. Runs on every
device."""

import torch

from ..fp16 import HALF, balanced_parts, row_power
from ..operator.codes import NVFP4
from ..operator.quantizers import dequantize, quantize_activation
from ..operator.transforms import transform_activation


def quant_linear(x, spec, tensors):
    """x (M, K) -> y (M, N) in the dtype of x. Arguments as in `naive.quant_linear`.

    The products run in the dtype of x with the device's own accumulation; everything before the codes is
    fp32. In fp16 they are those of each token divided by a power of two, so that nothing but the result can
    overflow: two passes more over y, and the same bits where no value is above 256.
    """
    if x.dtype == HALF:
        return _in_range(x, spec, tensors)
    dtype = x.dtype
    if spec.order:
        x = x.index_select(1, tensors["channel_order"])
    y = tensors["bias"].to(dtype) if spec.bias else None
    for tx, weight in _dequantized_parts(x, spec, tensors):
        y = torch.addmm(y, tx, weight.T) if y is not None else tx @ weight.T
    if spec.rank:
        downs = [
            x[:, p.start : p.stop] @ tensors["proj_down"][p.start : p.stop].to(dtype) for p in spec.parts
        ]
        y = y.addmm_(torch.cat(downs, -1), tensors["proj_up"].to(dtype).T)
    return y


def _in_range(x, spec, tensors):
    """`quant_linear` in fp16."""
    if spec.order:
        x = x.index_select(1, tensors["channel_order"])
    of_parts = zip(spec.split(tensors), spec.factors(tensors), spec.downs(tensors), strict=True)
    inputs = [_input(x, *part) for part in of_parts]
    power = row_power(
        *(_magnitude(values, scale, part) for (values, scale), part in zip(inputs, spec.parts, strict=True))
    )
    inverse, y = 1 / power, None
    if spec.bias:
        y = (tensors["bias"].float() * inverse).to(HALF)
    for (values, scale), (part, packed, scales, _) in zip(inputs, spec.split(tensors), strict=True):
        if scale is None:
            tx = (values * inverse).to(HALF)
        else:
            tx = dequantize(values, scale * inverse, part.activation.granularity, part.activation.group).to(
                HALF
            )
        weight = _weight(packed, scales, part, HALF)
        y = torch.addmm(y, tx, weight.T) if y is not None else tx @ weight.T
    if spec.rank:
        down, up = balanced_parts(spec, tensors)
        low = torch.cat([x[:, p.start : p.stop] @ down[p.start : p.stop] for p in spec.parts], -1)
        y = y.addmm_((low * inverse).to(HALF), up.T)
    return y.mul_(power)  # in fp32: there is no 2^16 in fp16


def _input(x, split, factors, down):
    """(codes, scale) of a part's activations, or (the transformed values in fp32, None)."""
    part, _, _, smooth = split
    xp, smooth = x[:, part.start : part.stop], None if smooth is None else smooth.float()
    if part.activation is None:
        return transform_activation(xp.float(), smooth, part.rotation, factors=factors), None
    return quantize_activation(xp, part, smooth, factors, down)


def _magnitude(values, scale, part):
    """(M or 1, any) fp32: no smaller than what the values of a row have."""
    if scale is None:
        return values.abs()
    return scale * part.activation.top


def _weight(packed, scales, part, dtype):
    grain = "group" if part.scale_rows > 1 else "channel"
    # Scales of two levels are no numbers of 16 bits; their products with codes are rounded once.
    scales = scales if part.grid == NVFP4 else scales.to(dtype)
    return dequantize(part.weight.unpack(packed), scales.T, grain, part.weight.group).to(dtype)


def _dequantized_parts(x, spec, tensors):
    for (part, packed, scales, smooth), factors, down in zip(
        spec.split(tensors), spec.factors(tensors), spec.downs(tensors), strict=True
    ):
        xp = x[:, part.start : part.stop]
        smooth = None if smooth is None else smooth.float()
        if part.activation is None:
            tx = transform_activation(
                xp if factors is None else xp.float(), smooth, part.rotation, factors=factors
            ).to(x.dtype)
        else:
            codes, scale = quantize_activation(xp, part, smooth, factors, down)
            tx = dequantize(codes, scale, part.activation.granularity, part.activation.group).to(x.dtype)
        yield tx, _weight(packed, scales, part, x.dtype)
