"""SVDQuant (Li et al., ICLR 2025): smooth, take out a low-rank branch, quantize the rest at 4 bits.

Differences from the paper, all judged on held-out tokens of the layer itself: the low rank may come from the
whitened SVD, the residual may be rounded by GPTQ, and with `rotation` a Hadamard rotation follows the
smoothing (`svdquant_r`); a part of the rank may take the strongest directions of x out before it is rounded
(`svdquant_p`, DiRotQ, arXiv 2605.16732): a layer whose inputs have a falling spectrum gains 5 dB, one without
takes none.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import torch

from ...kernels.operator.codes import GELU_SHIFT, INT, ActivationSpec, four_bits
from ...kernels.operator.quantizers import dequantize
from ...kernels.operator.spec import PartSpec
from ...kernels.operator.transforms import rotation_size, to_raw, to_transformed
from ..layer.assemble import (
    FittedPart,
    column_absmax,
    fit_parts,
    folded,
    folded_t,
    output_error,
    outputs,
    round_part,
    smoothing,
)
from ..layer.chunks import row_chunks
from ..layer.lowrank import projected, truncated
from ..layer.problem import Fitted, Problem
from . import gptq, grids, principal
from .ranking import at_a_time, rough_errors

# What goes through to GPTQ: of transforms with and without principal components the best rounded to nearest.
# GPTQ gains 0.2 to 2.6 dB, not the same with each: on a falling spectrum the rotated one is 0.2 dB better
# before it and 0.2 dB worse behind. One that is FAR behind never caught up.
CARRIED = 2
FAR = 2.5  # times the error, 4 dB
# Of all energy, what fp32 leaves where components are taken out of second moments. A text of 48 different
# rows, one direction of them 50 times the others, has less than that left.
NOISE = 1e-6


@dataclass(frozen=True)
class SVDQuantConfig:
    """Each field is one choice, for ablations.

    smooth: (alpha, beta) candidates of s = stat(x)^alpha / absmax(w)^beta; smooth_statistics: stat, "absmax"
    or "rms". low_rank: candidates "plain" and "whitened". damp: share of the mean of diag H added to it, for
    both uses of H. iterations: rounds of L = SVD(W - Q(W - L)), stopped at the first that does not help
    (SVDQuant, section 4.2). gptq: also try it for the residual. rotation: largest Hadamard block to try after
    the smoothing, 0 for none. unsigned_after_gelu: shifted unsigned codes where x >= -0.17. tokens: held-out
    tokens used to choose. Smoothing and activation codes are ranked on `rough_rows` out-channels; the first
    `finalists` of each kind of transform are fitted in full. principal: shares of the rank to
    try as principal components of x, which are taken out of it before it is rounded (`svdquant_p`). grid:
    "int" with groups of 64, or "nvfp4" with its own of 16, whose activations are never shifted; mixed: beside
    nvfp4 layers on int, where that is closer (`grids`).
    """

    rank: int = 32
    smooth: tuple = ((0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (0.5, 0.25), (0.65, 0.35), (0.8, 0.2), (0.9, 0.0))
    smooth_statistics: tuple = ("absmax", "rms")
    low_rank: tuple = ("plain", "whitened")
    iterations: int = 1
    gptq: bool = True
    damp: float = 0.01
    rotation: int = 0
    unsigned_after_gelu: bool = True
    tokens: int = 256
    rough_rows: int = 512
    finalists: int = 2
    principal: tuple = ()
    grid: str = INT
    mixed: bool = True


def fit(problem: Problem, config: SVDQuantConfig) -> Fitted:
    """Fits each part of the layer on its own. Without statistics: no smoothing, plain SVD, round to
    nearest."""
    return _fit(problem, config) if config.grid == INT else grids.closer(problem, _fit, config)


def _fit(problem, config):
    return fit_parts(problem, lambda part: PartFit(problem, part, config).fit())


class PartFit:
    """The fit of one part: its slice of the weight, tokens to judge by, and the exact output on them.

    scale_of: the scales of rounding to nearest, as `WeightSpec.rounded` takes it. RobuQ overrides that,
    `_specs` and `_refined`.
    """

    scale_of: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, problem, part, config):
        self.config, self.part, self.dtype = config, part, problem.dtype
        self.weight = problem.weight[:, part.start : part.stop]
        self.rank = min(config.rank, self.weight.shape[0], *(p.stop - p.start for p in problem.layer.parts))
        self.statistics = problem.statistics
        tokens = problem.tokens("select")
        self.x = None if tokens is None else tokens[: config.tokens, part.start : part.stop]
        self._kept: tuple | None = None
        if self.x is not None:
            self.y = outputs(self.x, self.weight)

    def fit(self):
        """(the best found, its choices)."""
        if self.x is None:
            best = self._without_data()
        else:
            transforms = self._transforms()
            found = [*transforms, *principal.best(self, transforms)]
            first, *others = sorted(found, key=error_of)[:CARRIED]
            near = [c for c in others if c.error < FAR * first.error]
            done = [self._refined(c, self._factor(c)) for c in near]
            best = min([*done, self._refined(first, self._factor(first, last=True))], key=error_of)
        return best, best.chosen

    def _refined(self, best, factor):
        best = self._iterated(self._whitened(best, factor))
        return min(best, self._gptq(best, factor), key=error_of) if self.config.gptq and factor else best

    # -- candidates

    def _specs(self):
        weight, signed = four_bits(self.config.grid)
        make = lambda act, rotation: PartSpec(
            self.part.start,
            self.part.stop,
            weight,
            act,
            smooth=self.x is not None,
            rotation=rotation,
            rank=self.rank,
        )
        # e2m1 always has a sign.
        shifted = self.part.after_gelu and self.config.unsigned_after_gelu and self.config.grid == INT
        yield make(ActivationSpec(unsigned=True, shift=GELU_SHIFT) if shifted else signed, 0)
        if self.config.rotation:
            yield make(signed, rotation_size(self.part.stop - self.part.start, self.config.rotation))

    def _candidates(self):
        for spec in self._specs():
            for label, smooth in self.smooths(spec.activation.shift):
                yield spec, label, smooth

    def _without_data(self):
        # GELU's lower bound needs no data; elsewhere a rotation is the only guard against outliers.
        first, last = (specs := list(self._specs()))[0], specs[-1]
        spec = first if first.activation.unsigned else last
        return self.rounded(spec, None, "plain", None, {"data": "none"})

    def _transforms(self):
        """The best smoothing with each kind of transform, rounded to nearest, the best last."""
        best: dict[str, FittedPart] = {}
        tried: Counter = Counter()
        for spec, label, smooth in self._ranked(list(self._candidates())):
            kind = _label(spec)
            tried[kind] += 1
            if tried[kind] > self.config.finalists:
                continue
            made = self.rounded(spec, smooth, "plain", None, {"smooth": label, "activation": kind})
            best[kind] = min(best.get(kind, made), made, key=error_of)
        return sorted(best.values(), key=error_of, reverse=True)

    def _ranked(self, candidates):
        """Candidates by the error that they would leave on at most `rough_rows` out-channels: 26 on a 3072 x
        3072 layer take 3 s so and 39 s in full."""
        errors = [
            self.rough(spec, [smooth for _, _, smooth in alike])
            for spec, alike in groupby(candidates, key=itemgetter(0))
        ]
        order = torch.cat(errors).nan_to_num(nan=torch.inf).sort(stable=True).indices
        return [candidates[i] for i in order.tolist()]

    def rough(self, spec, smooths, directions=None):
        """Errors (C,) fp64 of some smoothings, roughly; directions: the principal components of each."""
        step = max(1, self.weight.shape[0] // self.config.rough_rows)
        step *= 1 if directions is None else 2  # these differ by more
        weight, y = self.weight[::step].float(), self.y[:, ::step]
        size = at_a_time(weight)
        return torch.cat(
            [
                rough_errors(
                    self,
                    spec,
                    torch.stack(smooths[i : i + size]),
                    weight,
                    y,
                    None if directions is None else torch.stack(directions[i : i + size]),
                )
                for i in range(0, len(smooths), size)
            ]
        )

    def smooths(self, shift):
        stats, span = self.statistics, slice(self.part.start, self.part.stop)
        absmax = stats.absmax[span].to(self.weight.device) + shift
        kinds = {"absmax": absmax}
        if stats.hessians:
            diagonal = torch.cat([stats.hessians[b].diagonal() for b in self.blocks()]).to(absmax)
            kinds["rms"] = (diagonal / stats.count).sqrt() + shift
        w, pairs = column_absmax(self.weight), dict.fromkeys(self.config.smooth)
        for kind in (k for k in self.config.smooth_statistics if k in kinds):
            if not pairs:
                break
            alpha, beta = torch.tensor(list(pairs), device=w.device).T[..., None]
            made = smoothing(kinds[kind], w, alpha, beta, self.dtype)
            yield from ((f"{kind} {a:g}/{b:g}", s) for (a, b), s in zip(pairs, made, strict=True))
            pairs.pop((0.0, 0.0), None)  # the same for every statistic

    # -- steps

    def rounded(
        self,
        spec,
        smooth,
        low_rank,
        factor,
        chosen,
        base=None,
        fixed=None,
    ):
        """Low rank of fold(W - base), then round to nearest. fixed: its columns of principal components."""
        pair = self._low_rank(spec, smooth, factor, base, fixed)
        codes, scales = round_part(
            self.folded(spec, smooth),
            replace(spec, rotation=0),
            None,
            self.dtype,
            over_transformed(pair, spec, smooth),
            scale_of=self.scale_of,
        )
        chosen = chosen | ({"low_rank": low_rank} if self.rank else {}) | {"rounding": "nearest"}
        return self._judged(FittedPart(spec, codes, scales, smooth, pair, chosen=chosen))

    def folded(self, spec, smooth):
        """W T^-1 (N, w) fp32 of the whole part. Kept until another transform asks for its own: low rank and
        rounding of each candidate read it."""
        if self._kept is None or self._kept[0] != spec.rotation or self._kept[1] is not smooth:
            self._kept = None  # never two at once
            whole = torch.empty(self.weight.shape, device=self.weight.device)
            for rows in row_chunks(*whole.shape, device=whole.device):
                whole[rows] = folded(self.weight, rows, spec, smooth)
            self._kept = spec.rotation, smooth, whole
        return self._kept[2]

    def _low_rank(
        self,
        spec,
        smooth,
        factor,
        base=None,
        fixed=None,
    ):
        if self.rank == spec.principal:
            return fixed
        whole = self.folded(spec, smooth)
        chunks = [] if base is None else row_chunks(*whole.shape, device=whole.device)
        for rows in chunks:
            whole[rows] -= base(rows)  # in place, and back behind it: there is no room for two
        v, u = truncated(
            lambda rows: whole[rows],
            whole.shape,
            self.rank - spec.principal,
            factor,
            device=whole.device,
            less=over_transformed(fixed, spec, smooth),
        )
        for rows in chunks:
            whole[rows] += base(rows)
        pair = to_raw(v, smooth, spec.rotation).to(self.dtype), u.to(self.dtype)
        return pair if fixed is None else tuple(torch.cat(two, 1) for two in zip(fixed, pair, strict=True))

    def _whitened(self, best, factor):
        """`best`, or what is better with the low rank that is best in the metric of the data."""
        if not (self.rank > best.spec.principal and factor and "whitened" in self.config.low_rank):
            return best
        return min(
            best,
            self.rounded(
                best.spec,
                best.smooth,
                "whitened",
                factor,
                best.chosen,
                fixed=principal.columns(best),
            ),
            key=error_of,
        )

    def _iterated(self, best, factor=None):
        """`best` after rounds of L = SVD(W - Q), Q = quant(W - L) for as long as they help. factor: of the
        metric of that SVD."""
        for _ in range(self.config.iterations if self.rank > best.spec.principal else 0):
            part = best.spec

            def quantized(rows, best=best, part=part):
                return dequantize(
                    best.codes[rows],
                    best.scales[rows].float(),
                    part.weight.granularity,
                    part.weight.group,
                )

            chosen = {k: v for k, v in best.chosen.items() if k not in ("low_rank", "rounding")}
            label = "iterated" if factor is None else "whitened, iterated"
            again = self.rounded(
                part,
                best.smooth,
                label,
                factor,
                chosen,
                quantized,
                principal.columns(best),
            )
            if again.error >= best.error:
                break
            best = again
        return best

    def _gptq(self, best, factor):
        self._kept = None  # the transposed copy takes its room
        residual = folded_t(self.weight, best.spec, best.smooth, best.low_rank)
        codes, scales = self._gptq_codes(residual, best, factor)
        del residual
        codes, scales = codes.T.contiguous(), scales.T.contiguous()
        chosen = best.chosen | {"rounding": "gptq"}
        return self._judged(replace(best, codes=codes, scales=scales, chosen=chosen))

    def _gptq_codes(self, residual, best, factor):
        weight = best.spec.weight
        return gptq.quantize(residual, factor, weight.bits, weight.group, self.dtype, grid=weight.grid)

    def blocks(self):
        return [b for b in sorted(self.statistics.hessians) if self.part.start <= b[0] < self.part.stop]

    def _factor(self, best, last=False):
        """Upper factors of the second moments of Tx, {(start, stop) within the part: C}; empty without
        them. last: the moments are used up."""
        if not (self.config.gptq or "whitened" in self.config.low_rank) or not self.statistics.hessians:
            return {}
        out = {}
        v = principal.removed(best)
        for block in self.blocks():
            h = self.moments(best, block, last)
            if h is None:
                return {}
            a, b = (edge - self.part.start for edge in block)
            noise = 0.0
            if v is not None:
                noise = NOISE * h.diagonal().sum()
                h = projected(h, v[a:b])
            out[a, b] = gptq.upper_factor(h, self.config.damp, noise)
        return out

    def moments(self, best, block, last=False):
        """Second moments (k, k) fp32 of Tx in a block; None where a cut of blocks fell into a rotation."""
        start, stop = block
        # A block's width is a multiple of the rotation wherever the part's is, except when a cut fell inside.
        if best.spec.rotation and (stop - start) % best.spec.rotation:
            return None
        taken = self.statistics.hessians.pop if last else self.statistics.hessians.__getitem__
        h = taken(block).to(self.weight.device, torch.float32, copy=not last)
        smooth = None
        if best.smooth is not None:
            smooth = best.smooth[start - self.part.start : stop - self.part.start]
        return gptq.transformed_moments(h, smooth, best.spec.rotation)

    # -- judgement

    def _judged(self, candidate):
        error = 0.0 if self.x is None else output_error(candidate, self.x, self.y)
        # Nothing is better than NaN, not even itself.
        return replace(candidate, error=math.inf if math.isnan(error) else error)


def error_of(candidate):
    return candidate.error


def over_transformed(pair, spec, smooth):
    """A low rank (down, up) over raw x as one over Tx, fp32; None for None."""
    if pair is None:
        return None
    moved = smooth is not None or spec.rotation
    return to_transformed(pair[0], smooth, spec.rotation) if moved else pair[0].float(), pair[1].float()


def _label(spec):
    return ("unsigned" if spec.activation.unsigned else "signed") + (
        f" H{spec.rotation}" if spec.rotation else ""
    )
