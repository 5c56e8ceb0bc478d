"""Whole numbers in place of nvfp4, for layers that they are closer for.

The values of e2m1 lie close together near 0 and far apart at the top. Of Gaussian inputs nvfp4 leaves 21 dB
and int4 in groups of 64 18.5, of evenly spread ones it is 21 and 23. The text of the small PixArt is of the
second kind behind its smoothing: of the keys and values made of it the rounding of x is all of the error, and
they are 1.5 to 2.1 dB closer in int4, while all other layers are 0.3 to 2.0 dB farther.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...kernels.operator.codes import GELU_SHIFT, INT, ActivationSpec, four_bits
from ...kernels.operator.quantizers import dequantize, quantize_activation
from ...kernels.operator.transforms import transform_activation
from ..layer.chunks import power_db
from ..layer.problem import Fitted, Problem, output_sqnr

AHEAD = 0.5  # dB that x must be closer by on nvfp4 for int not to be fitted, which takes as long again
WORTH = 0.5  # dB that int must be closer by: on cards with fp4 products it takes 1.6 times as long


class _Kept(dict):
    """Second moments of which a fit that uses them up gets copies."""

    def pop(self, key):
        return self[key].clone()


def closer(problem: Problem, fit: Callable[[Problem, Any], Fitted], config: Any) -> Fitted:
    """fit(problem, config), or where that is closer on held-out tokens fit(problem, config on the int grid).

    config: has `grid`, nvfp4, and `mixed`; without it and without calibration there is nothing to choose.
    """
    statistics = problem.statistics
    if not config.mixed or statistics is None or problem.tokens("select") is None:
        return fit(problem, config)
    kept = replace(statistics, hessians=_Kept(statistics.hessians))
    made = fit(replace(problem, statistics=kept), config)
    if _ahead(problem, made) > AHEAD:
        return made
    whole = fit(problem, replace(config, grid=INT))
    if _reached(problem, whole) <= _reached(problem, made) + WORTH:
        return made
    return Fitted(whole.layer, whole.choices | {"grid": INT})


def _reached(problem, fitted):
    """dB of the output on the tokens to choose by."""
    return output_sqnr(problem, fitted.layer, "select")


def _ahead(problem, fitted) -> float:
    """dB by which the layer's activations are closer on its own grid than on int, behind its smoothing and,
    on int, with its rotation or without, which spreads values that were even."""
    smooth, x = fitted.layer.tensors.get("smooth_factor"), problem.tokens("select")
    noise = of_int = 0.0
    for part, held in zip(fitted.layer.spec.parts, problem.layer.parts, strict=True):
        columns = slice(part.start, part.stop)
        s = smooth[columns].float() if part.smooth else None
        own = replace(part, rank=0, principal=0)
        turned = replace(own, activation=four_bits(INT)[1])
        unsigned = ActivationSpec(unsigned=True, shift=GELU_SHIFT)
        plain = replace(turned, rotation=0, activation=unsigned if held.after_gelu else turned.activation)
        noise += _noise(
            x[:, columns],
            own,
            s,
        )
        of_int += min(_noise(x[:, columns], spec, s) for spec in (turned, plain))
    return power_db(of_int, noise)


def _noise(x, part, smooth) -> float:
    """Energy that the rounding of activations x (M, w) adds behind a part's transforms."""
    act = part.activation
    codes, scale = quantize_activation(x, part, smooth)
    tx = transform_activation(x.float(), smooth, part.rotation, act.shift)
    return (dequantize(codes, scale, act.granularity, act.group) - tx).double().square().sum().item()
