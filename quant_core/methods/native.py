"""What stock ComfyUI runs without this pack: convrot_w4a4 or nvfp4, int8_tensorwise with a rotation, or 16
bit, layer by layer.

ConvRot (comfy-kitchen's convrot_w4a4) has no smoothing, no groups and no low rank, nvfp4 no smoothing, no
rotation and no low rank, so they are too coarse for some layers: each gets the cheapest format whose output
reaches a quality. The clip of a row's range, scales of groups and GPTQ change nothing at run time.
"""

from dataclasses import dataclass, replace

import torch

from ...kernels.operator.codes import INT, NVFP4
from ...kernels.operator.quantizers import best_clip_scale, dequantize
from ...kernels.operator.spec import ActivationSpec, PartSpec, WeightSpec
from ..formats.kitchen.declared import INT8_CHANNELS, ROTATIONS, width_is_read
from ..layer.assemble import FittedPart, assemble, folded, folded_t, round_part
from ..layer.chunks import power_db, row_chunks
from ..layer.problem import Fitted, Problem, output_sqnr
from . import gptq, tensor_nvfp4

# DB: a rotated token is about as Gaussian as a rotated row, so that codes of x add as much error as those of
# W.
BOTH_SIDES = 3.0


@dataclass(frozen=True)
class NativeConfig:
    """quality_db: SQNR that the output of a layer must reach on held-out tokens; without calibration that of
    its weights less 3 dB, which is 16 dB at 4 bits and 40 at 8 whatever the inputs are: every layer has 8
    bits then.

    At 20 pictures of the small FLUX with hard outliers are as close to full precision as svdquant's: picture
    by picture 1.1 dB closer (0.4 to 2.1, 34 of 48); 16 to 24 choose the same layers there, and with 0 every
    layer has 4 bits, 16.7 dB farther (15.6 to 18.0, 0 of 48). With no and mild outliers 20 beats 18 by the
    PSNR of 24 pictures as one, 36.8 and 38.4 dB against 34.2 and 36.8. gptq, damp: as in SVDQuantConfig.
    grid: what 4 bits are, "int" (convrot_w4a4) or "nvfp4".
    """

    quality_db: float = 20.0
    gptq: bool = True
    damp: float = 0.01
    grid: str = INT


def fit(problem: Problem, config: NativeConfig) -> Fitted:
    """The best 4-bit candidate where it reaches `quality_db`, else 8 bits, else None: 16 bit. Weight-only
    layers start at 8 bits, and those whose stored width ComfyUI reads. ComfyUI pads nothing: in-channels that
    do not divide by 64 have 8 bits, and 16 where they do not divide by 16."""
    padded, problem = problem.padding, problem.raw()
    if problem.layer.spatial:
        return Fitted(None, {"a 1x1 convolution,": "of which stock ComfyUI has no quantized one"})
    if problem.layer.in_features % INT8_CHANNELS:
        return Fitted(
            None,
            {
                "K": f"= {problem.layer.in_features} does not divide by {INT8_CHANNELS}, as stock ComfyUI's "
                "formats need"
            },
        )
    whole = problem.layer.weight_only or padded or width_is_read(problem.layer.name)
    whole = whole or (config.grid == NVFP4 and not tensor_nvfp4.takes(problem))
    for bits in (8,) if whole else (4, 8):
        quality, part, chosen = max(
            (_judged(problem, *c) for c in _candidates(problem, bits, config)), key=lambda f: f[0]
        )
        if quality >= config.quality_db:
            return Fitted(assemble(problem, [part]), chosen)
    return Fitted(None, {"at 8 bits": f"{quality:.1f} dB, below {config.quality_db:g}"})


def _judged(problem, part, chosen):
    """(dB, part, chosen)."""
    if problem.tokens("select") is None:
        return _weight_sqnr(problem, part) - BOTH_SIDES, part, chosen
    return output_sqnr(problem, assemble(problem, [part]), "select"), part, chosen


def _candidates(problem, bits, config):
    """Yields (part, {choice: value}). At 8 bits clipping and GPTQ bring nothing: rounding is 1 % of what x
    costs at 4 bits."""
    if bits == 4 and config.grid == NVFP4:
        yield from _nvfp4_candidates(problem, config)
        return
    size = _rotation(problem)
    spec = PartSpec(
        0,
        problem.layer.in_features,
        WeightSpec(bits, "channel"),
        ActivationSpec(bits, "token"),
        rotation=size,
    )
    yield _nearest(problem, spec), {"rounding": "nearest"}
    if bits == 8:
        return
    clipped = _nearest(problem, spec, lambda w: best_clip_scale(w, bits, "channel"))
    yield clipped, {"rounding": "nearest, clipped"}
    if _has_moments(problem, config):
        yield _gptq(problem, clipped, config.damp), {"rounding": "gptq, clipped"}


def _nvfp4_candidates(problem, config):
    start = tensor_nvfp4.nearest(problem)
    yield start, {"grid": NVFP4, "rounding": "nearest"}
    if _has_moments(problem, config):
        found = tensor_nvfp4.by_gptq(problem, start, config.damp)
        yield found, {"grid": NVFP4, "rounding": "gptq"}


def _has_moments(problem, config):
    """Whether GPTQ is asked for and has what it takes."""
    return config.gptq and problem.tokens("select") is not None and problem.statistics.hessians


def _rotation(problem: Problem) -> int:
    """The largest block of which all blocks of second moments are multiples; 16 always is one."""
    edges = {problem.layer.in_features}
    if problem.statistics is not None:
        edges |= {edge for block in problem.statistics.blocks for edge in block}
    return next(s for s in ROTATIONS if all(edge % s == 0 for edge in edges))


def _nearest(problem, spec, scale_of=None):
    codes, scales = round_part(problem.weight, spec, None, torch.float32, scale_of=scale_of)
    return FittedPart(spec, codes, scales)


def _gptq(problem, start, damp):
    """The part with codes by GPTQ at the scales it has."""
    spec, factor = start.spec, {}
    for block, moments in problem.statistics.hessians.items():
        h = moments.to(problem.weight.device, torch.float32)
        factor[block] = gptq.upper_factor(gptq.transformed_moments(h, None, spec.rotation), damp)
    folded_weight = folded_t(problem.weight, spec, None)
    codes, _ = gptq.quantize(
        folded_weight, factor, 4, spec.width, torch.float32, scales=start.scales.T.contiguous()
    )
    return replace(start, codes=codes.T.contiguous())


def _weight_sqnr(problem, part) -> float:
    signal = noise = 0.0
    for rows in row_chunks(*problem.weight.shape, device=problem.weight.device):
        want = folded(problem.weight, rows, part.spec, None)
        form = part.spec.weight
        got = dequantize(part.codes[rows], part.scales[rows], form.granularity, form.group)
        signal += want.double().square().sum().item()
        noise += (want - got).double().square().sum().item()
    return power_db(signal, noise)
