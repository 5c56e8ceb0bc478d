"""Fixtures that every folder of tests shares."""

import pytest
import torch

from comfyui_nibble.quant_core.calibration import InputStatistics
from comfyui_nibble.quant_core.calibration.statistics import hessian_blocks
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.methods import Problem
from tests.support import outlier_tokens


@pytest.fixture
def make_problem():
    """A function that builds a Problem: (n, k, parts=None, calibrated=True, ...)."""

    def make(n, k, parts=None, calibrated=True, bias=True, fit_tokens=4096, dtype=torch.bfloat16, seed=0):
        g = torch.Generator().manual_seed(seed)
        parts = parts or (Part(0, k),)
        layer = Layer("blocks.0.linear", "blocks.0", k, n, tuple(parts), "blocks.0.linear")
        tokens = lambda count, s: torch.cat([outlier_tokens(count, p.stop - p.start, s + i, p.after_gelu) for i, p in enumerate(parts)], 1)
        fit = tokens(fit_tokens, 1000)
        weight = torch.randn(n, k, generator=g) / k**0.5 / fit.square().mean(0).sqrt().clamp(min=0.1)
        statistics = None
        if calibrated:
            statistics = InputStatistics.empty(layer.input, k, hessian_blocks([(p.start, p.stop) for p in parts], 3072))
            statistics.update(fit)
            statistics.hold_out(tokens(1024, 2000), torch.rand(1024, generator=g, dtype=torch.float64), 0.5)
        return Problem(layer, weight.to(dtype), torch.randn(n, generator=g).to(dtype) if bias else None, statistics)

    return make
