"""RobuQ (ICML 2026), its post-training part: ternary weights, a Hadamard rotation, few-bit activations per
token, a 16-bit low rank.

The rotation makes tokens look Gaussian, so that one clip in sigmas fits all of them; weights are {-1, 0, 1}
times a scale per channel. Differences from the paper, judged on held-out tokens: channels are smoothed before
the rotation, which alone leaves strong outliers in place (the small FLUX with hard ones at rank 0: 6.8 dB
without smoothing, 14.0 without rotation, 16.2 with both); the ternary codes may come from GPTQ; the low rank
is fitted in the metric of the data. Not here: training; a second trit plane, a t1 + b t2, whose codes are
uniform only at a = 3 b, where they are nine of the fifteen levels that the same four stored bits have.
"""

from dataclasses import dataclass, replace

import torch

from ...kernels.operator.quantizers import ternary_scale
from ...kernels.operator.spec import ActivationSpec, PartSpec, WeightSpec
from ...kernels.operator.transforms import rotation_size, transform_activation
from ..layer.assemble import fit_parts
from ..layer.problem import Fitted, Problem
from . import gptq
from .svdquant import PartFit, SVDQuantConfig, error_of

# Where a uniform quantizer with 2^bits - 1 levels (at 1 bit two, without a zero) has its largest code, in
# sigmas, for the least squared error on a Gaussian. At 1 bit that is the mean of |x|, sqrt(2 / pi) sigma: 4.4
# dB.
SIGMA_CLIP = {1: 0.7979, 2: 1.22, 3: 1.95, 4: 2.45, 8: 3.94}


@dataclass(frozen=True)
class RobuQConfig:
    """Each field is one choice, for ablations; what is not explained is as in SVDQuantConfig.

    activation_bits: 1, 2, 3, 4 or 8. clip: factors of the Gaussian-optimal clip to try, () for absmax.
    rotation: largest Hadamard block. iterations: rounds of ternary and low rank in turn, of each kind of low
    rank, stopped at the first that does not help.
    """

    activation_bits: int = 4
    rank: int = 32
    rotation: int = 256
    smooth: tuple = SVDQuantConfig.smooth
    smooth_statistics: tuple = ("absmax", "rms")
    clip: tuple = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
    low_rank: tuple = ("plain", "whitened")
    iterations: int = 3
    gptq: bool = True
    damp: float = 0.01
    tokens: int = 256
    rough_rows: int = 512
    finalists: int = 2
    principal: tuple = ()


def fit(problem: Problem, config: RobuQConfig) -> Fitted:
    """Fits each part of the layer on its own. Without statistics: rotation, Gaussian clip, ternary by least
    squares, plain SVD.

    Raises SpecError for activation bits that are not 1, 2, 3, 4 or 8.
    """
    return fit_parts(problem, lambda part: RobuQPart(problem, part, config).fit())


class RobuQPart(PartFit):
    """The fit of one part; see PartFit."""

    scale_of = staticmethod(ternary_scale)

    def _specs(self):
        width = self.part.stop - self.part.start
        yield PartSpec(
            self.part.start,
            self.part.stop,
            WeightSpec(2, "channel"),
            ActivationSpec(self.config.activation_bits, "token", clip=self._gaussian_clip(width)),
            smooth=self.x is not None,
            rotation=rotation_size(width, self.config.rotation),
            rank=self.rank,
        )

    def _candidates(self):
        """Every smoothing, with the clip that would be best for its tokens if they were Gaussian."""
        for spec, label, smooth in super()._candidates():
            yield self._with_clip(spec, self._sigma_clip(spec, smooth)), label, smooth

    def _transforms(self):
        return [self._clipped(best) for best in super()._transforms()]

    def _refined(self, best, factor):
        best = self._whitened(best, factor)
        for metric in (None, factor) if factor else (None,):
            best = min(best, self._iterated(best, metric), key=error_of)
        return min(best, self._gptq(best, factor), key=error_of) if self.config.gptq and factor else best

    # -- clip

    def _gaussian_clip(self, width):
        """The share of the largest of `width` normal numbers, its median, at which SIGMA_CLIP lies."""
        largest = float(torch.special.ndtri(torch.tensor((1 + 0.5 ** (1 / width)) / 2, dtype=torch.float64)))
        return (
            min(1.0, SIGMA_CLIP.get(self.config.activation_bits, 1.0) / largest) if self.config.clip else 1.0
        )

    def _sigma_clip(self, spec, smooth):
        """SIGMA_CLIP as a share of the absmax of the tokens to judge by, their median; tokens of zeros have
        none."""
        tx = transform_activation(self.x, smooth, spec.rotation)
        largest = tx.abs().amax(-1)
        ratio = (tx.square().mean(-1).sqrt() / largest)[largest > 0]
        return SIGMA_CLIP[self.config.activation_bits] * float(ratio.median()) if len(ratio) else 1.0

    def _with_clip(self, spec, clip):
        if not self.config.clip:
            return spec
        return replace(spec, activation=replace(spec.activation, clip=round(min(1.0, clip), 4)))

    def _clipped(self, best):
        """`best` with the clip, among factors of the one it has, that leaves the least error of the
        output."""
        start = best.spec.activation.clip
        for factor in self.config.clip:
            spec = self._with_clip(best.spec, start * factor)
            best = min(best, self._judged(replace(best, spec=spec)), key=error_of)
        clip = best.spec.activation.clip
        return replace(best, chosen=best.chosen | {"clip": f"{clip:g}"})

    # -- ternary GPTQ

    def _gptq_codes(self, residual, best, factor):
        """GPTQ at the scales that rounding has, then the best scale a row for the codes it gave: <w, q> / <q,
        q> in the metric of the data, worth 1.6 dB in the layers of the small FLUX at rank 0 and 0.1 dB at
        rank 32."""
        weight, width = residual.clone(), residual.shape[0]
        codes, scales = gptq.quantize(
            residual, factor, 2, width, self.dtype, scales=best.scales.T.contiguous()
        )
        wq, qq = torch.zeros_like(weight[0]), torch.zeros_like(weight[0])
        for (start, stop), c in factor.items():
            q = c.T @ codes[start:stop].float()
            wq += (c.T @ weight[start:stop]).mul_(q).sum(0)
            qq += q.square_().sum(0)
        tiny = torch.finfo(self.dtype).tiny  # rows without a code, and those whose codes do not help
        return codes, torch.where(qq > 0, wq / qq, scales[0].float()).clamp(min=tiny).to(self.dtype)[None]
