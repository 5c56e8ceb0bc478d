"""A layer rounded again by GPTQ, after its transform was trained: smoothing, factors and scales as they
are."""

import torch

from ...kernels.operator.packing import pack
from ..layer.assemble import folded_t
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem
from ..methods import gptq


def round_again(problem: Problem, layer: QuantizedLayer, damp: float = 0.01) -> QuantizedLayer | None:
    """The layer with GPTQ's codes; None where there are no second moments, their blocks cut a slice or a
    Hadamard block, the activations are shifted (the bias has a correction of the old codes in it), or the
    layer's in-channels are in an order of their own.

    problem: with the statistics of the layer's input.
    """
    if problem.statistics is None or not problem.statistics.hessians or "channel_order" in layer.tensors:
        return None
    packed = []
    for (part, _, scales, smooth), factors in zip(
        layer.spec.split(layer.tensors), layer.spec.factors(layer.tensors), strict=True
    ):
        if part.activation is not None and part.activation.shift:
            return None
        step = part.kronecker[0] * part.kronecker[1] if part.kronecker else part.rotation or 1
        smooth = None if smooth is None else smooth.float()
        upper = {}
        for (start, stop), h in sorted(problem.statistics.hessians.items()):
            if not part.start <= start < part.stop:
                continue
            a, b = start - part.start, stop - part.start
            if a % step or (b - a) % step:
                return None
            pick = slice(a // step, b // step) if part.per_slice else slice(None)
            local = None if factors is None else tuple(f[pick].float() for f in factors)
            h = h.to(problem.weight.device, torch.float32)
            here = None if smooth is None else smooth[a:b]
            h = gptq.transformed_moments(h, here, part.rotation, local)
            upper[a, b] = gptq.upper_factor(h, damp)
        weight = problem.weight[:, part.start : part.stop]
        low_rank = None
        if part.rank:
            i = layer.spec.parts.index(part)
            low_rank = (
                layer.tensors["proj_down"][part.start : part.stop],
                layer.tensors["proj_up"][:, i * part.rank : (i + 1) * part.rank],
            )
        factors = None if factors is None else tuple(f.float() for f in factors)
        rest = folded_t(weight, part, smooth, low_rank, factors)
        group = part.weight.group if part.weight.granularity == "group" else part.width
        codes, _ = gptq.quantize(
            rest, upper, part.weight.bits, group, scales.dtype, scales=scales.contiguous()
        )
        packed.append(pack(codes.T.contiguous(), part.weight.bits))
    return QuantizedLayer(layer.name, layer.spec, layer.tensors | {"weight": torch.cat(packed, 1)})
