"""Layers on a CPU: PyTorch's linear, ours as it is stored and as a loaded model holds it. Medians of wall
clock."""

import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ....kernels.dispatch import choose
from ....kernels.operator.spec import LinearSpec
from ....kernels.quant_linear import eager
from ....kernels.target import target_of
from .cases import generator, random_input, random_tensors
from .model import NibbleLinear, layer_spec
from .timing import median
from .verify import Difference

SECONDS, SAMPLES = 0.6, (3, 25)  # of one figure, and the least and most calls that it is the median of
GRAINS = {"group": "SVDQuant, groups of 64, rank 32", "channel": "ConvRot, channels, blocks of 256"}


def wall(call: Callable[[], object], seconds: float = SECONDS, clock=time.perf_counter) -> dict:
    """{"ms", "min_ms", "samples"} of a call, behind one that is not counted."""
    call()
    times: list[float] = []
    while len(times) < SAMPLES[0] or (sum(times) < 1000 * seconds and len(times) < SAMPLES[1]):
        started = clock()
        call()
        times.append(1000 * (clock() - started))
    return {"ms": median(times), "min_ms": min(times), "samples": len(times)}


@torch.no_grad()
def layer(n: int, k: int, m: int) -> dict[str, dict]:
    """{name: figures} of a layer of n out- and k in-channels on m tokens; x is fp32 but for "torch bf16".

    error: relative, of the form at load from that as stored. Where the first is W8A8 it is mostly the noise
    of the second's 4-bit activations.
    """
    g = generator(n + k, "cpu")
    x, weight = random_input(m, k, torch.float32, "cpu", g), random_input(n, k, torch.float32, "cpu", g)
    bias = random_input(1, n, torch.float32, "cpu", g)[0]
    found = {"torch fp32": wall(lambda: linear(x, weight, bias))}
    low = [t.bfloat16() for t in (x, weight, bias)]
    found["torch bf16"] = wall(lambda: linear(*low))
    for grain, title in GRAINS.items():
        found |= _ours(layer_spec(n, k, "", grain), grain, title, x)
    return found


def _ours(spec: LinearSpec, grain: str, title: str, x) -> dict[str, dict]:
    seed, target = spec.in_features + spec.out_features, target_of("cpu")
    stored = random_tensors(spec, torch.bfloat16, "cpu", generator(seed, "cpu"))
    held = NibbleLinear(spec, torch.bfloat16, "cpu", generator(seed, "cpu"), target)
    difference = Difference()
    difference.add(eager.quant_linear(x, spec, stored), held(x))
    return {
        f"{grain}, as stored": wall(lambda: eager.quant_linear(x, spec, stored))
        | {"note": f"{title}: eager", "bytes": sum(t.nbytes for t in stored.values())},
        f"{grain}, at load": wall(lambda: held(x))
        | {
            "note": f"{choose(held.spec, target).path} ({held.spec.precision})",
            "bytes": sum(t.nbytes for t in held.buffers()),
            "error": difference.check("stored", 1.0).error,
        },
    }
