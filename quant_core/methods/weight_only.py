"""W4A16, group 64: adaLN modulation, where a step has one row a picture and memory is all that counts.

SVDQuant rounds these layers to nearest (section 5), which was most of the small FLUX's whole error: 0.094 of
the 0.103 that its latents were off. Their inputs are an embedding of timestep, guidance and pooled text,
nearly of low rank: GPTQ brings 6 dB for nothing there, and a whitened low rank of 32 with GPTQ 13 dB for 0.2
bits a weight at FLUX's widths (29.9, 35.6 and 42.9 dB in single_blocks.0).
"""

from operator import itemgetter

import torch

from ...kernels.operator.quantizers import GROUP, best_clip_scale, quantize
from ...kernels.operator.spec import PartSpec, WeightSpec
from ..layer.assemble import FittedPart, assemble, folded, folded_t, output_error, outputs
from ..layer.chunks import row_chunks
from ..layer.lowrank import truncated
from ..layer.problem import Fitted, Problem
from . import gptq


def fit(problem: Problem, rank: int = 0, use_gptq: bool = False, damp: float = 0.01) -> Fitted:
    """Round to nearest with the clip of least squares; with statistics also GPTQ and a whitened low rank of
    `rank`, whichever is best on held-out tokens."""
    tokens = problem.tokens("select")
    exact = None if tokens is None else outputs(tokens, problem.weight)
    judged = lambda part: 0.0 if tokens is None or exact is None else output_error(part, tokens, exact)
    # One beside the best in memory; the first of equals is taken.
    candidates = _candidates(problem, rank, use_gptq, damp, tokens)
    _, part, chosen = min(((judged(part), part, chosen) for part, chosen in candidates), key=itemgetter(0))
    return Fitted(assemble(problem, [part]), chosen)


def _candidates(problem, rank, use_gptq, damp, tokens):
    yield _nearest(problem, None, {"rounding": "nearest"})
    if tokens is None or not problem.statistics.hessians:
        return
    factor = {
        b: gptq.upper_factor(h.to(problem.weight.device, torch.float32), damp)
        for b, h in problem.statistics.hessians.items()
    }
    if use_gptq:
        yield _gptq(problem, None, factor, {"rounding": "gptq"})
    if rank := min(rank, *problem.weight.shape):
        v, u = truncated(
            lambda rows: problem.weight[rows].float(),
            problem.weight.shape,
            rank,
            factor,
            device=problem.weight.device,
        )
        pair = (v.to(problem.dtype), u.to(problem.dtype))
        yield _nearest(problem, pair, {"low_rank": "whitened", "rounding": "nearest"})
        if use_gptq:
            yield _gptq(problem, pair, factor, {"low_rank": "whitened", "rounding": "gptq"})


def _spec(problem, pair):
    rank = 0 if pair is None else pair[0].shape[1]
    return PartSpec(0, problem.layer.in_features, WeightSpec(), None, rank=rank)


def _nearest(problem, pair, chosen):
    spec, codes, scales = _spec(problem, pair), [], []
    for rows in row_chunks(*problem.weight.shape, device=problem.weight.device):
        weight = folded(problem.weight, rows, spec, None, pair)
        scale = best_clip_scale(weight, 4, "group").to(problem.dtype)
        codes.append(quantize(weight, scale.float(), 4, "group"))
        scales.append(scale)
    return FittedPart(spec, torch.cat(codes), torch.cat(scales), low_rank=pair), chosen


def _gptq(problem, pair, factor, chosen):
    spec = _spec(problem, pair)
    folded_weight = folded_t(problem.weight, spec, None, pair)
    codes, scales = gptq.quantize(folded_weight, factor, 4, GROUP, problem.dtype)
    return FittedPart(spec, codes.T.contiguous(), scales.T.contiguous(), low_rank=pair), chosen
