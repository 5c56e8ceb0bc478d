"""What a method is given and what it returns, and how candidates are judged."""

import math
from dataclasses import dataclass, field, replace

import torch

from ...kernels.operator.quantizers import GROUP
from ..families import Layer
from .chunks import power_db, row_chunks
from .linear import QuantizedLayer
from .soundness import UnfitLayer, largest
from .statistics import InputStatistics


@dataclass
class Problem:
    """A layer to quantize: weight (N, K) in its own dtype, bias (N,) or None, statistics of its input or None
    (data-free).

    padding: how many of the in-channels, the last, are zeros that fill a group of 64; layer, weight and
    statistics have them, x does not.
    """

    layer: Layer
    weight: torch.Tensor
    bias: torch.Tensor | None
    statistics: InputStatistics | None
    padding: int = 0

    @property
    def original(self) -> torch.Tensor:
        """The model's own weight, without padding."""
        return self.weight[:, : self.weight.shape[1] - self.padding]

    def raw(self) -> "Problem":
        """Without padding; without second moments where there was one, which are of no use to the one method
        that asks."""
        if not self.padding:
            return self
        k, stats = self.layer.in_features - self.padding, self.statistics
        *parts, last = self.layer.parts
        layer = replace(self.layer, in_features=k, parts=(*parts, replace(last, stop=k)))
        if stats is not None:
            stats = replace(
                stats, width=k, blocks=(), absmax=stats.absmax[:k], hessians={}, tokens=stats.tokens[:, :k]
            )
        return Problem(layer, self.original, self.bias, stats)

    def filled(self) -> "Problem":
        """With zeros behind the in-channels where they do not fill a group of 64. Every method is exact with
        them: zeros of x and W have the code zero, smoothed or not, and a rotation of both by one orthogonal
        matrix changes no product."""
        padding = -self.layer.in_features % GROUP
        if not padding:
            return self
        *parts, last = self.layer.parts
        k = self.layer.in_features + padding
        layer = replace(self.layer, in_features=k, parts=(*parts, replace(last, stop=k)))
        weight = torch.nn.functional.pad(self.weight, (0, padding))
        return Problem(
            layer,
            weight,
            self.bias,
            self.statistics and self.statistics.padded(padding),
            self.padding + padding,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the 16-bit tensors that are stored."""
        return torch.float16 if self.weight.dtype == torch.float16 else torch.bfloat16

    def tokens(self, purpose: str) -> torch.Tensor | None:
        """Held-out tokens (R, K) fp32: one half for "select"ing among candidates, the other for the
        "report"."""
        if self.statistics is None or not len(self.statistics.tokens):
            return None
        return self.statistics.tokens[{"select": 0, "report": 1}[purpose] :: 2].to(self.weight.device).float()


@dataclass
class Fitted:
    """A quantized layer, None where it stays in 16 bit, and what a report says of it. choices: what was
    chosen, by name; sqnr_db: on the report tokens."""

    layer: QuantizedLayer | None
    choices: dict = field(default_factory=dict)
    sqnr_db: float | None = None


def output_sqnr(problem: Problem, quantized: QuantizedLayer, purpose: str = "report") -> float | None:
    """SQNR in dB of the layer's output on held-out tokens, by the operator itself; None without calibration.

    Raises UnfitLayer where the full-precision output is not finite, and for purpose "report" where the
    quantized one is not; a candidate of "select" with such an output is the worst, at -inf."""
    x = problem.tokens(purpose)
    if x is None:
        return None
    y = quantized(x[:, : quantized.spec.in_features])
    signal = noise = 0.0
    for rows in row_chunks(*problem.weight.shape, device=problem.weight.device):
        want = x @ problem.weight[rows].float().T
        if problem.bias is not None:
            want += problem.bias[rows].float()
        signal += want.double().square().sum().item()
        noise += (want - y[:, rows]).double().square().sum().item()
    for what, energy in (("full-precision", signal), ("quantized", noise)):
        if not math.isfinite(energy) and (what == "full-precision" or purpose == "report"):
            raise UnfitLayer(
                f"layer {problem.layer.name}: its {what} output on {len(x)} held-out tokens is not finite; "
                "its weight goes up to "
                f"{largest(problem.weight):.3g}, these tokens up to {largest(x):.3g}. Calibrate again with "
                "other prompts, or take "
                "another file of the model."
            )
    return power_db(signal, noise) if math.isfinite(noise) else -math.inf
