"""Fixtures that every folder of tests shares."""

import os
import sys
from pathlib import Path

# Before anything imports triton: without a GPU the kernels' tests run in its interpreter. Processes that
# tests start inherit it.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Several processes share the cores; processes that tests start inherit it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch
from safetensors.torch import load_file

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.layer.statistics import InputStatistics, hessian_blocks
from comfyui_nibble.tests.support import outlier_tokens
from comfyui_nibble.tests.unwritten import filled_with_junk

# `python -m pytest` puts the repository on the path, where diffusers would take our `kernels` for the package
# of that name.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


# Folders whose layers are as they are on most cards, and the same on every processor; host/test_int8.py has
# what a CPU makes of them.
AS_STORED = ("host", "reliability")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.path.resolve().relative_to(ROOT / "tests").parts[0] in AS_STORED:
        os.environ.setdefault("NIBBLE_INT8", "0")  # a module may have set it to 1
    else:
        os.environ.pop("NIBBLE_INT8", None)


@pytest.fixture(scope="session", autouse=True)
def unwritten_memory():
    """What reads memory that nobody has written gets NaN."""
    with filled_with_junk():
        yield


@pytest.fixture(scope="session")
def tiny_state():
    """The shipped model's tensors, ComfyUI's names."""
    return load_file(tiny_flux.CHECKPOINT)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, tiny_state):
    """A diffusers pipeline folder of the shipped model, its text encoders and VAE small and random."""
    from comfyui_nibble.tests.assets.pipelines import flux  # diffusers and transformers: seconds

    folder = tmp_path_factory.mktemp("pipeline") / "flux"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux(tiny_state).save_pretrained(folder)
    return folder


@pytest.fixture
def make_problem():
    """A function that builds a Problem: (n, k, parts=None, calibrated=True, ...)."""

    def make(n, k, parts=None, calibrated=True, bias=True, fit_tokens=4096, dtype=torch.bfloat16, seed=0):
        g = torch.Generator().manual_seed(seed)
        parts = parts or (Part(0, k),)
        layer = Layer("blocks.0.linear", "blocks.0", k, n, tuple(parts), "blocks.0.linear")
        tokens = lambda count, s: torch.cat(
            [outlier_tokens(count, p.stop - p.start, s + i, p.after_gelu) for i, p in enumerate(parts)], 1
        )
        fit = tokens(fit_tokens, 1000)
        weight = torch.randn(n, k, generator=g) / k**0.5 / fit.square().mean(0).sqrt().clamp(min=0.1)
        statistics = None
        if calibrated:
            statistics = InputStatistics.empty(
                layer.input, k, hessian_blocks([(p.start, p.stop) for p in parts], 3072)
            )
            statistics.update(fit)
            statistics.hold_out(tokens(1024, 2000), torch.rand(1024, generator=g, dtype=torch.float64), 0.5)
        return Problem(
            layer, weight.to(dtype), torch.randn(n, generator=g).to(dtype) if bias else None, statistics
        )

    return make
