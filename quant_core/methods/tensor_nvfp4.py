"""ComfyUI's nvfp4 for a layer of one part: weights in e2m1 under e4m3 scales with one fp32 scale above them
all, x with one of its tensor.

That scale is a power of two here, of which rounding loses nothing: rows keep powers of their own in memory,
and a file for ComfyUI moves them into the e4m3 scales (`formats.kitchen.nvfp4.one_scale`).
"""

from dataclasses import replace

import torch

from ...kernels.operator import nvfp4
from ...kernels.operator.codes import NVFP4
from ...kernels.operator.spec import PartSpec
from ..formats.kitchen.nvfp4 import ACTIVATION, ROWS, WEIGHT
from ..layer.assemble import FittedPart, folded_t, round_part
from ..layer.problem import Problem
from . import gptq


def takes(problem: Problem) -> bool:
    """Whether ComfyUI has the layer's shape in nvfp4."""
    return problem.layer.in_features % nvfp4.GROUP == 0 and problem.layer.out_features % ROWS == 0


def nearest(problem: Problem) -> FittedPart:
    """Rounded to nearest, each group at the better of two scales ("Four over Six")."""
    spec = PartSpec(0, problem.layer.in_features, WEIGHT, ACTIVATION)
    # The largest group has room for a 4 in its place: its scale is then a quarter of it.
    outer = nvfp4.power_below(problem.weight.abs().amax().float() / 4)
    codes, scales = round_part(
        problem.weight, spec, None, torch.float32, scale_of=lambda w: nvfp4.four_over_six(w, outer)
    )
    return FittedPart(spec, codes, scales)


def by_gptq(problem: Problem, start: FittedPart, damp: float) -> FittedPart:
    """Rounded by GPTQ, which searches the scales; at those of `start` where the found ones of all rows do
    not fit under one."""
    assert problem.statistics is not None
    device, spec = problem.weight.device, start.spec
    factor = {
        block: gptq.upper_factor(moments.to(device, torch.float32, copy=True), damp)
        for block, moments in problem.statistics.hessians.items()
    }

    def rounded(scales):
        weight = folded_t(problem.weight, spec, None)
        return gptq.quantize(weight, factor, 4, nvfp4.GROUP, torch.float32, scales=scales, grid=NVFP4)

    codes, scales = rounded(None)
    outer = nvfp4.power_below(2 * scales.amax())
    used = scales > 0  # a group of zeros fits any scale
    if not torch.equal(nvfp4.under(scales, outer)[used], scales[used]):
        codes, scales = rounded(start.scales.T.contiguous())
    return replace(start, codes=codes.T.contiguous(), scales=scales.T.contiguous())
