"""Round to nearest, no transform, no calibration: the baseline that must lose."""

from dataclasses import dataclass

import torch

from ...kernels.operator.codes import INT, ActivationSpec, WeightSpec, four_bits
from ...kernels.operator.spec import PartSpec
from ..layer.assemble import FittedPart, assemble, round_part
from ..layer.problem import Fitted, Problem


@dataclass(frozen=True)
class RTNConfig:
    """activation: "token", "group" or "tensor"; weight: "channel", "group" or "tensor". grid: "int", or
    "nvfp4", which has groups of its own on both sides."""

    activation: str = "token"
    weight: str = "channel"
    rotation: int = 0
    grid: str = INT


def fit(problem: Problem, config: RTNConfig) -> Fitted:
    """One part over all in-channels; scales in fp32, as convrot_w4a4 stores them, but for nvfp4's."""
    weight, activation = WeightSpec(granularity=config.weight), ActivationSpec(granularity=config.activation)
    if config.grid != INT:
        weight, activation = four_bits(config.grid)
    part = PartSpec(0, problem.layer.in_features, weight, activation, rotation=config.rotation)
    codes, scales = round_part(problem.weight, part, None, torch.float32)
    layer = assemble(problem, [FittedPart(part, codes, scales)])
    return Fitted(layer)
