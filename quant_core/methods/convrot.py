"""ConvRot as ComfyUI runs it (convrot_w4a4): regular Hadamard, per-token activations, per-channel weights, no
calibration."""

from dataclasses import dataclass

from ...kernels.operator.codes import INT
from ..layer.problem import Fitted, Problem
from .rtn import RTNConfig
from .rtn import fit as fit_rtn


@dataclass(frozen=True)
class ConvRotConfig:
    """rotation: largest block; the largest power of four that divides K and is not above it is taken
    (comfy-kitchen). grid: "int" as ComfyUI has it, or "nvfp4"."""

    rotation: int = 256
    grid: str = INT


def fit(problem: Problem, config: ConvRotConfig) -> Fitted:
    """RTN after a rotation by the regular Hadamard matrix."""
    size = max(
        (s for s in (4, 16, 64, 256) if s <= config.rotation and problem.layer.in_features % s == 0),
        default=0,
    )
    return fit_rtn(problem, RTNConfig(rotation=size, grid=config.grid))
