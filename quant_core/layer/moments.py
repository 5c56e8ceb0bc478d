"""X^T X: exact products, sums in fp32, and of the symmetric matrix only the upper triangle."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

# Rows of X^T X that are computed at once, from the diagonal on: 58 % of the products of a 3072-wide matrix.
# 256 would be 54 %, and 1024 67 %; a CPU takes 35, 38 and 45 ms for the three at 1024 tokens, and a GPU
# wants large tiles.
TILE = 512


def add_upper(moments: torch.Tensor, x: torch.Tensor):
    """Adds x^T x of x (tokens, K) to the upper triangle of `moments` (K, K) fp32, in place. What stands below
    the diagonal is that of no matrix until `mirror` writes it.

    Products of two bf16 values have 16 significant bits and are exact in fp32, so that a GPU's or a CPU's
    bf16 units with fp32 sums lose nothing: only a result in bf16 would.
    """
    if on_tensor_cores := _exact_on_tensor_cores(x):
        add = lambda into, a, b: into.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        add = lambda into, a, b: into.addmm_(a, b)
    with nullcontext() if on_tensor_cores else _bf16_units(x):
        x = x if on_tensor_cores else x.float()
        for start in range(0, len(moments), TILE):
            stop = min(start + TILE, len(moments))
            add(moments[start:stop, start:], x[:, start:stop].T, x[:, start:])


def mirror(moments: torch.Tensor):
    """Writes what is above the diagonal of (K, K) below it, in place, a tile at a time: no copy of the whole
    is made."""
    for start in range(0, len(moments), TILE):
        stop = min(start + TILE, len(moments))
        square = moments[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        moments[stop:, start:stop] = moments[start:stop, stop:].T


def _exact_on_tensor_cores(x) -> bool:
    """Whether this torch multiplies 16-bit matrices into fp32 where x is: 2.8 and later on CUDA."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.is_cuda
        and torch.version.hip is None
        and "dtype" in torch.ops.aten.mm.overloads()
    )


@contextmanager
def _bf16_units(x) -> Iterator[None]:
    """Lets oneDNN multiply fp32 copies of bf16 values by the CPU's bf16 units (AMX, AVX-512), with fp32 sums
    and results: the same to rounding in 2.4 of 5.5 parts of the time. Nothing else has them but `mm` in bf16,
    whose result is rounded to bf16. The setting is put back at once."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    settable = matmul is not None and hasattr(matmul, "fp32_precision")  # torch 2.9
    if matmul is None or not settable or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        yield
        return
    was = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = was
