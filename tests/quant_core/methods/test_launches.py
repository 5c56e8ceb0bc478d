"""How many kernels a fit launches on a card and how often it waits, counted by torch's dispatcher."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from comfyui_nibble.quant_core.evaluation import bench_fit
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer import chunks
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.methods import METHODS, gptq, ranking, svdquant

VIEWS = (
    *("view", "slice", "select", "t.", "transpose", "expand", "unsqueeze", "squeeze", "detach", "alias"),
    *("fill_.", "as_strided", "permute", "unbind", "split", "diagonal", "_unsafe_view", "empty", "new_empty"),
    "lift_fresh",
)


class Launches(TorchDispatchMode):
    """Counts operators that are no views, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        self.count[name] += not name.startswith(VIEWS)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Chunks and batches as on a card, and GPTQ's kernel as one launch."""
    monkeypatch.setattr(chunks, "CHUNK", chunks.ON_A_CARD)
    monkeypatch.setattr(svdquant, "at_a_time", lambda weight: ranking.BATCH // weight.numel())
    rows = gptq._rows

    def block(columns, *args):
        columns.relu()  # counted
        with _disable_current_modes():
            rows(columns, *args)

    monkeypatch.setattr(gptq, "_rows", block)


def test_a_fit_of_3072_by_3072(as_on_a_card):
    """33,548 and 53 before the kernel, the batches and the Gram matrices; 1,349 and 7 with one transform to
    the end, where there is one of each transform now."""
    layer = Layer("bench", "bench", 3072, 3072, (Part(0, 3072),), "bench")
    statistics = bench_fit.statistics(layer)
    problem = Problem(layer, bench_fit.weight(layer, statistics), torch.zeros(3072), statistics)
    method = METHODS["svdquant_r"]
    with Launches() as launches:
        method.fit(problem, method.config)
    assert launches.count.total() <= 2400  # 2,338
    assert launches.count["_local_scalar_dense.default"] <= 14
    assert launches.count["relu.default"] == 2 * 3072 // 128
    assert launches.count["linalg_qr.default"] == launches.count["_linalg_svd.default"] == 0
