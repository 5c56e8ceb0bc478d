"""What Python costs in front of the launches of a step: kernels do nothing here, so what is left is the
caller's thread, without Triton's own launch.

It is what a GPU waits for where its kernels are faster than that. Measured on tensors of the CPU, planned for
whatever card is asked for; the layers are narrow, which changes neither their launches nor their Python.
What torch itself computes in a layer runs here on the CPU and is counted. It is little, but for RTX 20, whose
low rank is torch's (115 ms a step).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ....kernels import spec_at_load
from ....kernels.dispatch import quant_linear
from ....kernels.prologue import Gelu
from ....kernels.target import Target
from .cases import LORA_RANK, generator, random_tensors
from .model import SINGLE, STREAM, Size, layer_spec

HIDDEN, ROWS = 64, 32  # so narrow that the products of a LoRA on modulation, torch's own, hardly count
CALLS, ROUNDS = 100, 5


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Triton's kernels do nothing within."""
    from triton.runtime.jit import KernelInterface

    kept = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda self, grid: lambda *args, **kwargs: None
    try:
        yield
    finally:
        KernelInterface.__getitem__ = kept


@contextmanager
def planned_for(target: Target) -> Iterator[None]:
    """Launches on tensors of the CPU are those of `target`, wherever this runs."""
    from ....kernels.fp4 import launch as fp4
    from ....kernels.quant_activation import launch as quantizer
    from ....kernels.quant_linear import launch as product
    from ....kernels.quant_linear import op
    from ....kernels.weight_only import launch as weight_only

    modules = (fp4, op, product, quantizer, weight_only)
    kept = [module.kernel_target for module in modules]
    for module in modules:
        module.kernel_target = lambda device: target  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, function in zip(modules, kept, strict=True):
            module.kernel_target = function  # type: ignore[attr-defined]


def layers(size: Size | None = None) -> dict[tuple[str, int, int, str], int]:
    """{(name, out- and in-channels in units of the hidden size, what x is): how many} of a model of FLUX.1's
    shape."""
    size = size or Size()
    double = dict.fromkeys(STREAM, 2 * size.double)
    return double | {(f"single {name}", n, k, kind): size.single for name, n, k, kind in SINGLE}


def call_of(kind: str, n: int, k: int, target: Target, lora: int = 0) -> Callable[[], torch.Tensor]:
    """A layer's forward as a loaded model calls it, in 16 bit: groups of 64 and a low rank, which is the
    files' default, in the form at load."""
    spec = spec_at_load(layer_spec(n * HIDDEN, k * HIDDEN, kind, "group", lora), target)
    dtype, g = target.matrix_dtype, generator(n * k, "cpu")
    tensors = random_tensors(spec, dtype, "cpu", g)
    x = torch.randn(1 if kind == "vector" else ROWS, spec.in_features, generator=g).to(dtype)
    prologue = Gelu() if kind == "gelu" else None
    return lambda: quant_linear(x, spec, tensors, prologue, target)


def microseconds(call: Callable[[], object], clock=time.process_time) -> float:
    """The least mean of CALLS calls, behind some that fill what is kept from call to call."""
    for _ in range(10):
        call()
    means = []
    for _ in range(ROUNDS):
        started = clock()
        for _ in range(CALLS):
            call()
        means.append((clock() - started) / CALLS)
    return 1e6 * min(means)


@contextmanager
def one_thread() -> Iterator[None]:
    """With two, a product of torch's took 7 ms in place of 0.05 where other processes had the second core."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


@torch.inference_mode()
def step(target: Target, size: Size | None = None, clock=time.process_time) -> dict:
    """{"plain": ..., "LoRA": ...}: milliseconds of all layers of a step, microseconds of each kind."""
    out: dict[str, dict] = {}
    with launches_left_out(), planned_for(target), one_thread():
        for label, lora in (("plain", 0), ("LoRA", LORA_RANK)):
            each, total, count = {}, 0.0, 0
            for (name, n, k, kind), number in layers(size).items():
                each[name] = microseconds(call_of(kind, n, k, target, lora), clock)
                total, count = total + number * each[name], count + number
            out[label] = {"ms": total / 1000, "layers": count, "us": each}
    return {"target": str(target), **out}
