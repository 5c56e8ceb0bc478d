"""SVDQuant (Li et al., ICLR 2025): smooth, take out a low-rank branch, quantize the rest at 4 bits.

Differences from the paper, all judged on held-out tokens of the layer itself: the low rank may come from the
whitened SVD, the residual may be rounded by GPTQ, and with `rotation` a Hadamard rotation follows the
smoothing (`svdquant_r`).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...kernels.operator.quantizers import GROUP, dequantize, quantize_activation
from ...kernels.operator.spec import GELU_SHIFT, ActivationSpec, PartSpec, WeightSpec
from ...kernels.operator.transforms import rotate, rotation_size
from ..layer.assemble import FittedPart, column_absmax, fit_parts, folded, folded_t, round_part, smoothing
from ..layer.chunks import row_chunks
from ..layer.lowrank import truncated
from ..layer.problem import Fitted, Problem
from . import gptq


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
            self.y = torch.cat(
                [self.x @ self.weight[rows].float().T for rows in row_chunks(*self.weight.shape)], 1
            )

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
        candidates = list(self._candidates())
        rough = self._every_few_rows()
        candidates.sort(key=lambda c: rough._rounded(c[0], c[2], "plain", None, {}).error)
        full = (
            self._rounded(p, s, "plain", None, {"smooth": t, "activation": _label(p)})
            for p, t, s in candidates[: self.config.finalists]
        )
        return min(full, key=error_of)

    def _every_few_rows(self):
        """The same part with at most `rough_rows` out-channels, for a first ranking: 26 candidates on a 3072
        x 3072 layer take 3 s so and 39 s in full."""
        step = max(1, self.weight.shape[0] // self.config.rough_rows)
        out = copy.copy(self)
        out.weight, out.y = self.weight[::step].contiguous(), self.y[:, ::step].contiguous()
        out.rank = min(self.rank, *out.weight.shape)
        return out

    def _smooths(self, shift):
        stats, span = self.statistics, slice(self.part.start, self.part.stop)
        absmax = stats.absmax[span].to(self.weight.device) + shift
        kinds = {"absmax": absmax}
        if stats.hessians:
            diagonal = torch.cat([stats.hessians[b].diagonal() for b in self._blocks()]).to(absmax)
            kinds["rms"] = (diagonal / stats.count).sqrt() + shift
        w = column_absmax(self.weight)
        seen = set()
        for kind in self.config.smooth_statistics:
            for alpha, beta in self.config.smooth:
                if kind not in kinds or ((alpha, beta) == (0, 0) and (0, 0) in seen):
                    continue
                seen.add((alpha, beta))
                yield f"{kind} {alpha:g}/{beta:g}", smoothing(kinds[kind], w, alpha, beta, self.dtype)

    # -- steps

    def _rounded(self, spec, smooth, low_rank, factor, chosen, base=None):
        """Low rank of fold(W - base), then round to nearest."""
        pair = self._low_rank(spec, smooth, factor, base)
        codes, scales = round_part(self.weight, spec, smooth, self.dtype, pair, scale_of=self.scale_of)
        chosen = chosen | ({"low_rank": low_rank} if self.rank else {}) | {"rounding": "nearest"}
        return self._judged(FittedPart(spec, codes, scales, smooth, pair, chosen=chosen))

    def _low_rank(self, spec, smooth, factor, base=None):
        if not self.rank:
            return None
        rows_of = lambda rows: folded(self.weight, rows, spec, smooth) - (0 if base is None else base(rows))
        v, u = truncated(rows_of, self.weight.shape, self.rank, factor)
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
            self._rounded(best.spec, best.smooth, "whitened", factor, best.chosen),
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
            again = self._rounded(part, best.smooth, label, factor, chosen, quantized)
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
        return gptq.quantize(residual, factor, best.spec.weight.bits, GROUP, self.dtype)

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
            h = self.statistics.hessians.pop((start, stop)).to(self.weight.device, torch.float32)
            if best.smooth is not None:
                s = best.smooth[a:b]
                h.div_(s).div_(s[:, None])
            if best.spec.rotation:
                # A block's width is a multiple of the rotation wherever the part's is, except when a cut fell
                # inside.
                if h.shape[0] % best.spec.rotation:
                    return {}
                h = rotate(rotate(h, best.spec.rotation).T, best.spec.rotation)
            out[a, b] = gptq.upper_factor(h, self.config.damp)
        return out

    # -- judgement

    def _judged(self, candidate):
        error = 0.0 if self.x is None else self._error_of(candidate)
        # Nothing is better than NaN, not even itself.
        return replace(candidate, error=math.inf if math.isnan(error) else error)

    def _error_of(self, candidate):
        spec, smooth = candidate.spec, candidate.smooth
        codes, scale = quantize_activation(self.x, spec, smooth)
        tx = dequantize(codes, scale, spec.activation.granularity, spec.activation.group)
        if spec.activation.shift:
            # Quantized weights also multiply the shift, which the bias takes back.
            tx = tx - (spec.activation.shift / smooth if smooth is not None else spec.activation.shift)
        low = None
        if candidate.low_rank is not None:
            low = self.x @ candidate.low_rank[0].float()
        error = 0.0
        for rows in row_chunks(*self.weight.shape):
            weight = dequantize(
                candidate.codes[rows],
                candidate.scales[rows].float(),
                spec.weight.granularity,
                spec.weight.group,
            )
            rest = torch.addmm(self.y[:, rows], tx, weight.T, alpha=-1)
            if low is not None:
                rest.addmm_(low, candidate.low_rank[1][rows].float().T, alpha=-1)
            error += rest.double().square().sum().item()
        return error


def error_of(candidate):
    return candidate.error


def _label(spec):
    return ("unsigned" if spec.activation.unsigned else "signed") + (
        f" H{spec.rotation}" if spec.rotation else ""
    )
