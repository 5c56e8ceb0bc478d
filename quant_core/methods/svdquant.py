"""SVDQuant (Li et al., ICLR 2025): smooth, take out a low-rank branch, quantize the rest at 4 bits.

Differences from the paper, all judged on held-out tokens of the layer itself: the low rank may come from the
whitened SVD, the residual may be rounded by GPTQ, and with `rotation` a Hadamard rotation follows the
smoothing (`svdquant_r`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import torch

from ...kernels.operator.quantizers import GROUP, dequantize
from ...kernels.operator.spec import GELU_SHIFT, ActivationSpec, PartSpec, WeightSpec
from ...kernels.operator.transforms import rotate, rotation_size
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
from ..layer.lowrank import truncated
from ..layer.problem import Fitted, Problem
from . import gptq
from .ranking import at_a_time, rough_errors


@dataclass(frozen=True)
class SVDQuantConfig:
    """Each field is one choice, for ablations.

    smooth: (alpha, beta) candidates of s = stat(x)^alpha / absmax(w)^beta; smooth_statistics: stat, "absmax"
    or "rms". low_rank: candidates "plain" and "whitened". damp: share of the mean of diag H added to it, for
    both uses of H. iterations: rounds of L = SVD(W - Q(W - L)), stopped at the first that does not help
    (SVDQuant, section 4.2). gptq: also try it for the residual. rotation: largest Hadamard block to try after
    the smoothing, 0 for none. unsigned_after_gelu: shifted unsigned codes where x >= -0.17. tokens: held-out
    tokens used to choose. Smoothing and activation codes are ranked on `rough_rows` out-channels; the first
    `finalists` are fitted in full.
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


def fit(problem: Problem, config: SVDQuantConfig) -> Fitted:
    """Fits each part of the layer on its own. Without statistics: no smoothing, plain SVD, round to
    nearest."""
    return fit_parts(problem, lambda part: PartFit(problem, part, config).fit())


class PartFit:
    """The fit of one part: its slice of the weight, tokens to judge by, and the exact output on them.

    scale_of: the scales of rounding to nearest, as `weight_codes` takes it. RobuQ overrides that, `_specs`
    and `_refined`.
    """

    scale_of: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, problem, part, config):
        self.config, self.part, self.dtype = config, part, problem.dtype
        self.weight = problem.weight[:, part.start : part.stop]
        self.rank = min(config.rank, self.weight.shape[0], *(p.stop - p.start for p in problem.layer.parts))
        self.statistics = problem.statistics
        tokens = problem.tokens("select")
        self.x = None if tokens is None else tokens[: config.tokens, part.start : part.stop]
        if self.x is not None:
            self.y = outputs(self.x, self.weight)

    def fit(self):
        """(the best found, its choices)."""
        best = self._best_transform()
        if self.x is not None:
            best = self._refined(best, self._factor(best))
        return best, best.chosen

    def _refined(self, best, factor):
        best = self._iterated(self._whitened(best, factor))
        return min(best, self._gptq(best, factor), key=error_of) if self.config.gptq and factor else best

    # -- candidates

    def _specs(self):
        make = lambda act, rotation: PartSpec(
            self.part.start,
            self.part.stop,
            WeightSpec(),
            act,
            smooth=self.x is not None,
            rotation=rotation,
            rank=self.rank,
        )
        if self.part.after_gelu and self.config.unsigned_after_gelu:
            yield make(ActivationSpec(unsigned=True, shift=GELU_SHIFT), 0)
        else:
            yield make(ActivationSpec(), 0)
        if self.config.rotation:
            yield make(
                ActivationSpec(), rotation_size(self.part.stop - self.part.start, self.config.rotation)
            )

    def _candidates(self):
        for spec in self._specs():
            for label, smooth in self._smooths(spec.activation.shift):
                yield spec, label, smooth

    def _best_transform(self):
        if self.x is None:
            # GELU's lower bound needs no data; elsewhere a rotation is the only guard against outliers.
            first, last = (specs := list(self._specs()))[0], specs[-1]
            return self._rounded(
                first if first.activation.unsigned else last, None, "plain", None, {"data": "none"}
            )
        full = (
            self._rounded(
                p,
                s,
                "plain",
                None,
                {"smooth": t, "activation": _label(p)},
            )
            for p, t, s in self._ranked(list(self._candidates()))[: self.config.finalists]
        )
        return min(full, key=error_of)

    def _ranked(self, candidates):
        """Candidates by the error that they would leave on at most `rough_rows` out-channels: 26 on a 3072 x
        3072 layer take 3 s so and 39 s in full."""
        step = max(1, self.weight.shape[0] // self.config.rough_rows)
        weight, y = self.weight[::step].float(), self.y[:, ::step]
        size = at_a_time(weight)
        errors = []
        for spec, alike in groupby(candidates, key=itemgetter(0)):
            smooths = [smooth for _, _, smooth in alike]
            for some in (smooths[i : i + size] for i in range(0, len(smooths), size)):
                errors.append(
                    rough_errors(
                        self,
                        spec,
                        torch.stack(some),
                        weight,
                        y,
                    )
                )
        order = torch.cat(errors).nan_to_num(nan=torch.inf).sort(stable=True).indices
        return [candidates[i] for i in order.tolist()]

    def _smooths(self, shift):
        stats, span = self.statistics, slice(self.part.start, self.part.stop)
        absmax = stats.absmax[span].to(self.weight.device) + shift
        kinds = {"absmax": absmax}
        if stats.hessians:
            diagonal = torch.cat([stats.hessians[b].diagonal() for b in self._blocks()]).to(absmax)
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

    def _rounded(
        self,
        spec,
        smooth,
        low_rank,
        factor,
        chosen,
        base=None,
    ):
        """Low rank of fold(W - base), then round to nearest."""
        pair = self._low_rank(spec, smooth, factor, base)
        codes, scales = round_part(
            self.weight,
            spec,
            smooth,
            self.dtype,
            pair,
            scale_of=self.scale_of,
        )
        chosen = chosen | ({"low_rank": low_rank} if self.rank else {}) | {"rounding": "nearest"}
        return self._judged(
            FittedPart(
                spec,
                codes,
                scales,
                smooth,
                pair,
                chosen=chosen,
            )
        )

    def _low_rank(
        self,
        spec,
        smooth,
        factor,
        base=None,
    ):
        if not self.rank:
            return None
        rows_of = lambda rows: folded(self.weight, rows, spec, smooth) - (0 if base is None else base(rows))
        v, u = truncated(
            rows_of,
            self.weight.shape,
            self.rank,
            factor,
            device=self.weight.device,
        )
        # (x / s) R v = x (diag(1/s) R v): the branch acts on the raw x.
        down = rotate(v.T, spec.rotation).T
        if smooth is not None:
            down = down / smooth[:, None]
        return down.to(self.dtype), u.to(self.dtype)

    def _whitened(self, best, factor):
        """`best`, or what is better with the low rank that is best in the metric of the data."""
        if not (self.rank and factor and "whitened" in self.config.low_rank):
            return best
        return min(
            best,
            self._rounded(
                best.spec,
                best.smooth,
                "whitened",
                factor,
                best.chosen,
            ),
            key=error_of,
        )

    def _iterated(self, best, factor=None):
        """`best` after rounds of L = SVD(W - Q), Q = quant(W - L) for as long as they help. factor: of the
        metric of that SVD."""
        for _ in range(self.config.iterations if self.rank else 0):
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
            again = self._rounded(
                part,
                best.smooth,
                label,
                factor,
                chosen,
                quantized,
            )
            if again.error >= best.error:
                break
            best = again
        return best

    def _gptq(self, best, factor):
        residual = folded_t(self.weight, best.spec, best.smooth, best.low_rank)
        codes, scales = self._gptq_codes(residual, best, factor)
        del residual
        codes, scales = codes.T.contiguous(), scales.T.contiguous()
        chosen = best.chosen | {"rounding": "gptq"}
        return self._judged(replace(best, codes=codes, scales=scales, chosen=chosen))

    def _gptq_codes(self, residual, best, factor):
        return gptq.quantize(
            residual,
            factor,
            best.spec.weight.bits,
            GROUP,
            self.dtype,
        )

    def _blocks(self):
        return [b for b in sorted(self.statistics.hessians) if self.part.start <= b[0] < self.part.stop]

    def _factor(self, best):
        """Upper factors of the second moments of Tx, {(start, stop) within the part: C}; empty without
        them."""
        if not (self.config.gptq or "whitened" in self.config.low_rank) or not self.statistics.hessians:
            return {}
        out = {}
        for start, stop in self._blocks():
            a, b = start - self.part.start, stop - self.part.start
            # A block's width is a multiple of the rotation wherever the part's is, except when a cut fell
            # inside.
            if best.spec.rotation and (stop - start) % best.spec.rotation:
                return {}
            h = self.statistics.hessians.pop((start, stop)).to(self.weight.device, torch.float32)
            smooth = None if best.smooth is None else best.smooth[a:b]
            h = gptq.transformed_moments(h, smooth, best.spec.rotation)
            out[a, b] = gptq.upper_factor(h, self.config.damp)
        return out

    # -- judgement

    def _judged(self, candidate):
        error = 0.0 if self.x is None else output_error(candidate, self.x, self.y)
        # Nothing is better than NaN, not even itself.
        return replace(candidate, error=math.inf if math.isnan(error) else error)


def error_of(candidate):
    return candidate.error


def _label(spec):
    return ("unsigned" if spec.activation.unsigned else "signed") + (
        f" H{spec.rotation}" if spec.rotation else ""
    )
