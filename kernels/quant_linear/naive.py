"""The executable specification of the operator, in exact integer arithmetic. Slow; tests compare every fast
path with it."""

import torch

from ..operator.quantizers import quantize_activation
from ..operator.transforms import transform_activation


def quant_linear(x, spec, tensors, lora=()):
    """x (M, K) float, any dtype -> y (M, N) float32.

    `spec` is a LinearSpec, `tensors` its tensors. `lora`: triples (down (r, K), up (n, r), first
    out-channel); the strength is folded into `up`.
    """
    raw, y = x, torch.zeros(x.shape[0], spec.out_features, device=x.device)
    x = torch.nn.functional.pad(x, (0, spec.padding))
    if spec.order:
        x = x.index_select(1, tensors["channel_order"])
    for i, ((part, packed, scales, smooth), factors, down) in enumerate(
        zip(spec.split(tensors), spec.factors(tensors), spec.downs(tensors), strict=True)
    ):
        xp = x[:, part.start : part.stop].float()
        codes, smooth = part.weight.unpack(packed), None if smooth is None else smooth.float()

        # Blocks of in-channels with one weight scale and one activation scale each; integer products inside a
        # block.
        step = part.weight.group if part.weight.granularity == "group" else part.width
        if part.activation is None:
            tx, a_scale = transform_activation(xp, smooth, part.rotation, factors=factors), None
        else:
            tx, a_scale = quantize_activation(x[:, part.start : part.stop], part, smooth, factors, down)
            if part.activation.granularity == "group":
                step = min(step, part.activation.group)
        for k in range(0, part.width, step):
            block = tx[:, k : k + step].double() @ codes[:, k : k + step].double().T
            block = block * scales[k // part.weight.group if part.scale_rows > 1 else 0].double()
            if a_scale is not None:
                grouped = part.activation.granularity == "group"
                block = block * a_scale[:, k // part.activation.group if grouped else 0, None].double()
            y += block.float()

        if part.rank:
            down = tensors["proj_down"][part.start : part.stop].float()
            up = tensors["proj_up"][:, i * part.rank : (i + 1) * part.rank].float()
            y += xp @ down @ up.T
    for down, up, first in lora:
        y[:, first : first + up.shape[0]] += raw.float() @ down.float().T @ up.float().T
    if spec.bias:
        y += tensors["bias"].float()
    return y
