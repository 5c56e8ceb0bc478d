"""Whole numbers in place of nvfp4, for layers that they are closer for.

On most layers nvfp4 is 1 to 5 dB closer than int4 in groups of 64. On a few it is not: GPTQ on the keys and
values that the small PixArt makes of a text, whose tokens have few different rows, gains 2.7 dB there and 4.2
on int, since the weights that it moves leave the range of a group of 16 sooner than that of 64.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...kernels.operator.codes import INT
from ..layer.problem import Fitted, Problem, output_sqnr

# dB on held-out tokens that a layer must reach on nvfp4 for int not to be fitted, too, which takes as long
# again: what lies below is what a picture suffers from.
ENOUGH = 20.0
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
    reached = _reached(problem, made)
    if reached >= ENOUGH:
        return made
    whole = fit(problem, replace(config, grid=INT))
    if _reached(problem, whole) <= reached + WORTH:
        return made
    return Fitted(whole.layer, whole.choices | {"grid": INT})


def _reached(problem, fitted):
    """dB of the output on the tokens to choose by."""
    return output_sqnr(problem, fitted.layer, "select")
