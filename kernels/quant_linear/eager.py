"""The operator in plain PyTorch: quantize and dequantize x, one matrix product a part. Runs on every device."""

import torch

from ...quant_core.packing import unpack
from ...quant_core.quantizers import dequantize
from ...quant_core.transforms import transform_activation
from .naive import quantize_activation


def quant_linear(x, spec, tensors, lora=()):
    """x (M, K) -> y (M, N) in the dtype of x. Arguments as in `naive.quant_linear`.

    The products run in the dtype of x with the device's own accumulation; everything before the codes is fp32.
    """
    dtype, raw = x.dtype, x
    if spec.order:
        x = x.index_select(1, tensors["channel_order"])
    y = tensors["bias"].to(dtype) if spec.bias else None
    for tx, weight in _dequantized_parts(x, spec, tensors):
        y = torch.addmm(y, tx, weight.T) if y is not None else tx @ weight.T
    if spec.rank:
        downs = [x[:, p.start : p.stop] @ tensors["proj_down"][p.start : p.stop].to(dtype) for p in spec.parts]
        y = y.addmm_(torch.cat(downs, -1), tensors["proj_up"].to(dtype).T)
    for down, up, first in lora:
        y[:, first : first + up.shape[0]].addmm_(raw @ down.to(dtype).T, up.to(dtype).T)
    return y


def _dequantized_parts(x, spec, tensors):
    for (part, packed, scales, smooth), factors in zip(spec.split(tensors), spec.factors(tensors), strict=True):
        xp = x[:, part.start : part.stop]
        smooth = None if smooth is None else smooth.float()
        if part.activation is None:
            tx = transform_activation(xp if factors is None else xp.float(), smooth, part.rotation, factors=factors).to(x.dtype)
        else:
            codes, scale = quantize_activation(xp, part, smooth, factors)
            tx = dequantize(codes, scale, part.activation.granularity, part.activation.group).to(x.dtype)
        grain = "group" if part.scale_rows > 1 else "channel"
        yield tx, dequantize(unpack(packed, part.weight.bits), scales.to(x.dtype).T, grain, part.weight.group)
