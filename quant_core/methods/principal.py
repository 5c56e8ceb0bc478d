"""Principal components in SVDQuant's low rank (DiRotQ, arXiv 2605.16732): the strongest directions of Tx skip
rounding."""

from dataclasses import replace

import torch

from ...kernels.operator.transforms import rotate, to_raw, to_transformed
from ..layer.lowrank import strongest

MOST = 64  # that the quantizer's kernel takes


def best(fit, transforms):
    """[the best FittedPart, rounded to nearest, that gives a share of `fit.config.principal` of the rank to
    components], with the transform of one of the PartFit `fit`'s `transforms`.

    Empty without second moments, and where all codes are shifted. Smoothing and transform are ranked anew:
    what is left of x has fewer outliers, and 0.5/0.5 is the best in layers where 0.8/0.2 was, worth 0.1 to
    0.7 dB in those of a small FLUX.
    """
    counts = [count for share in fit.config.principal if (count := min(round(share * fit.rank), MOST))]
    plain = [c for c in transforms if not c.spec.activation.shift]
    if not (plain and fit.statistics.hessians and counts):
        return []
    labels, smooths = zip(*fit.smooths(0.0), strict=True)
    rough = [_directions(fit, smooth, counts[0], iterations=1) for smooth in smooths]
    errors = torch.cat([fit.rough(c.spec, smooths, rough) for c in plain])
    of, i = divmod(int(errors.nan_to_num(nan=torch.inf).argmin()), len(smooths))
    smooth, rotation = smooths[i], plain[of].spec.rotation
    directions = rotate(_directions(fit, smooth, max(counts)).T, rotation).T
    made = []
    for count in counts:
        v, spec = directions[:, :count], replace(plain[of].spec, principal=count)
        down = to_raw(v, smooth, rotation).to(fit.dtype)
        up = (fit.folded(spec, smooth) @ v).to(fit.dtype)
        chosen = plain[of].chosen | {"smooth": labels[i], "principal": count}
        made.append(fit.rounded(spec, smooth, "plain", None, chosen, fixed=(down, up)))
    return [min(made, key=lambda part: part.error)]


def columns(best):
    """The columns (down (w, P), up (N, P)) of the low rank that components have, None without."""
    count = best.spec.principal
    return tuple(side[:, :count] for side in best.low_rank) if count else None


def removed(best):
    """The components V (w, P) as the operator takes them out of Tx, None without."""
    if not best.spec.principal:
        return None
    return to_transformed(best.low_rank[0][:, : best.spec.principal], best.smooth, best.spec.rotation)


def _directions(fit, smooth, count, iterations=4):
    """(w, count) fp32: orthonormal, the most energy in x / s first, s `smooth` (w,)."""
    found = []
    for start, stop in fit.blocks():
        h = fit.statistics.hessians[start, stop].to(fit.weight.device, torch.float32)
        scale = smooth[start - fit.part.start : stop - fit.part.start]
        found.append(strongest(h, count, iterations, scale))
    values = torch.cat([values for values, _ in found])
    return torch.block_diag(*[vectors for _, vectors in found])[:, values.argsort(descending=True)[:count]]
