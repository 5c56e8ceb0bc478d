"""Fits and statistics of layers of FLUX's sizes on the device, as `nibble bench-fit` has them."""

import time

import torch

from ...layer.statistics import InputStatistics, hessian_blocks
from ...methods import METHODS
from .. import bench_fit
from .timing import median

WIDTHS = (3072, 12288)
TOKENS = 4608  # of a picture of 1024 x 1024 and its text


def fit(layer: str, method: str, device: str) -> dict:
    """One layer of `bench_fit.LAYERS`, or "" for a block."""
    chosen = METHODS[method]
    found = bench_fit.fit_layer(layer, chosen, device) if layer else bench_fit.fit_block(chosen, device)
    return found | {"ms": 1000 * found["seconds"]}


@torch.no_grad()
def calibration(device: torch.device, repeats: int = 3) -> dict:
    """{in-channels: milliseconds} that a layer's input costs while calibrating: (TOKENS, in-channels) in
    bf16, into its statistics."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    out: dict[str, float] = {}
    for width in WIDTHS:
        x = torch.randn(TOKENS, width, dtype=torch.bfloat16, device=device)
        held = InputStatistics.empty("bench", width, hessian_blocks([(0, width)], width))
        held.update(x)
        times = []
        for _ in range(repeats):
            wait()
            started = time.perf_counter()
            held.update(x)
            wait()
            times.append(1000 * (time.perf_counter() - started))
        out[str(width)] = median(times)
    return out
