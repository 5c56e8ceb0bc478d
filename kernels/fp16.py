"""Products in fp16 whose terms leave its range, 65504, while the result does not: powers of two hold them in,
and change no rounding.

fp16 overflows in three places that full precision does not have: x smoothed, rotated or transformed; the
low-rank x @ down; and a sum that is put together from rounded terms. Layers with one outlier channel reach
the first two at x of 6e4.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

HALF = torch.float16
# Down is divided by at most 2^12: of values of 0.1 that leaves 400 steps of fp16's smallest, an error of the
# branch of -65 dB.
MOST = 12
# Values up to here are left alone: terms of a sum have as much room again, and what is 2^-32 of the largest
# is not lost.
CALM = 256.0
# {down: (versions, up, factor)}: eleven launches less for a layer that has been seen.
_kept = WeakTensorKeyDictionary()


def row_power(*largest: torch.Tensor) -> torch.Tensor:
    """(M, 1) fp32, powers of two p >= 1 such that no row of the `largest` magnitudes, each (M or 1, any)
    fp32, exceeds CALM p. NaN stays."""
    peak = largest[0].amax(-1, keepdim=True)
    for other in largest[1:]:
        peak = torch.maximum(peak, other.amax(-1, keepdim=True))
    return (peak / CALM).clamp(min=1.0).log2().ceil().exp2()


def balanced(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(down D, up / D) in fp16 of a low-rank branch down (K, R), up (N, R) of any float dtype, D powers of
    two a column.

    Where the magnitudes of a column of down sum to 1 at most, x @ down cannot overflow for any finite x. D is
    no smaller than 2^-MOST, and not so small that up would overflow. A pass over down and up each; none over
    x.
    """
    factor = _factor(down, up)
    return (down * factor).to(HALF), (up / factor).to(HALF)


def balanced_parts(spec, tensors: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """`balanced` of a layer's proj_down (K, R) and proj_up (N, parts R), part by part. The powers are kept
    for as long as proj_down lives."""
    down, up = tensors["proj_down"], tensors["proj_up"]
    # Tensors of inference mode have no version, so nobody sees them change.
    keeps = not torch.compiler.is_compiling() and not (down.is_inference() or up.is_inference())
    mark = (down._version, up._version, up.data_ptr()) if keeps else None
    held = _kept.get(down) if keeps else None
    if held is None or held[0] != mark:
        ups = up.split(spec.rank, 1)
        held = mark, [_factor(down[p.start : p.stop], u) for p, u in zip(spec.parts, ups, strict=True)]
        if keeps:
            _kept[down] = held
    factors = held[1]
    downs = [(down[p.start : p.stop] * f).to(HALF) for p, f in zip(spec.parts, factors, strict=True)]
    return torch.cat(downs) if len(downs) > 1 else downs[0], (up / torch.cat(factors)).to(HALF)


def _factor(down, up):
    """(R,) fp32."""
    norm = torch.linalg.vector_norm(down, 1, dim=0, dtype=torch.float32)
    room = (
        15
        - torch.linalg.vector_norm(up, torch.inf, dim=0, dtype=torch.float32)
        .clamp(min=2.0**-24)
        .log2()
        .ceil()
    )
    # 1.01: rounding to fp16 may add to the norm.
    return torch.exp2(-torch.minimum((1.01 * norm).clamp(min=1.0).log2().ceil(), room).clamp(0, MOST))
