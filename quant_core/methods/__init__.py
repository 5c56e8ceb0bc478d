"""Methods: functions from (weight, statistics, config) to a spec and its tensors. A new paper is a new file
here."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from ...kernels.operator.codes import four_bits
from ..layer.problem import Fitted, Problem
from ..layer.soundness import UnfitLayer, naming, require_finite_fit
from . import convrot, native, robuq, rtn, splitquant, svdquant, weight_only


@dataclass(frozen=True)
class Method:
    """`config` holds the defaults, `fit(problem, config)` returns a Fitted. weight_only: it fits weight-only
    layers too. bits: the fewest that a weight takes."""

    name: str
    title: str
    fit: Callable[..., Fitted]
    config: Any
    weight_only: bool = False
    bits: int = 4

    def configured(self, **options):
        """The config with `options` set. Raises ValueError for an option that the method does not have, and
        for a grid that nobody has."""
        known = {f.name for f in fields(self.config)}
        if unknown := set(options) - known:
            first = min(unknown)
            others = [m.name for m in METHODS.values() if first in {f.name for f in fields(m.config)}]
            have = f"; {', '.join(others)} {'have' if len(others) > 1 else 'has'} it" if others else ""
            raise ValueError(
                f"method {self.name} has no option {first}{have}. It has {', '.join(sorted(known))}."
            )
        if "grid" in options:
            four_bits(options["grid"])
        return replace(self.config, **{name: _fixed(value) for name, value in options.items()})


def _fixed(value):
    """Lists, as JSON has them, as the tuples that the configs have."""
    return tuple(map(_fixed, value)) if isinstance(value, (list, tuple)) else value


METHODS = {
    m.name: m
    for m in (
        Method(
            "svdquant_r",
            "SVDQuant with a Hadamard rotation",
            svdquant.fit,
            svdquant.SVDQuantConfig(rotation=256),
        ),
        Method(
            "svdquant_p",
            "SVDQuant with a rotation and principal components",
            svdquant.fit,
            svdquant.SVDQuantConfig(rotation=256, principal=(0.5, 1.0)),
        ),
        Method("svdquant", "SVDQuant", svdquant.fit, svdquant.SVDQuantConfig()),
        Method(
            "splitquant",
            "SplitQuant (slices share a rotation, groups of 64, no low rank)",
            splitquant.fit,
            splitquant.ROTATED,
        ),
        Method(
            "splitquant_4",
            "SplitQuant (4 slices share a transform, per token and channel)",
            splitquant.fit,
            splitquant.SplitQuantConfig(),
        ),
        Method("convrot", "ConvRot (per token and channel)", convrot.fit, convrot.ConvRotConfig()),
        Method("rtn", "Round to nearest (baseline)", rtn.fit, rtn.RTNConfig()),
        Method("robuq", "RobuQ (ternary weights)", robuq.fit, robuq.RobuQConfig(), bits=2),
        Method("native", "What stock ComfyUI runs", native.fit, native.NativeConfig(), weight_only=True),
    )
}


def by_name(name: str) -> Method:
    """The method called `name`; ValueError listing all otherwise."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}. Methods: {', '.join(METHODS)}.")
    return METHODS[name]


def fit_problem(problem: Problem, method: Method, config) -> Fitted:
    """The method's fit, or `weight_only`'s with what the method says of low rank and GPTQ. Raises UnfitLayer,
    which names the layer, where linear algebra fails or NaN or Inf comes out."""
    with naming(problem.layer.name, problem.weight, problem.statistics):
        if method.weight_only or not problem.layer.weight_only:
            fitted = method.fit(problem, config)
        else:
            fitted = weight_only.fit(problem, getattr(config, "rank", 0), getattr(config, "gptq", False))
    require_finite_fit(problem.layer.name, fitted.layer)
    return fitted


__all__ = ["METHODS", "Fitted", "Method", "Problem", "UnfitLayer", "by_name", "fit_problem"]
