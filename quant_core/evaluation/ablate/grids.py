"""The rows of the comparison of grids: whole numbers in groups of 64 and nvfp4, by three methods, and whole
numbers with as many bits a weight as nvfp4 has."""

from dataclasses import replace

from ....kernels.operator.codes import NVFP4
from ...methods import METHODS
from .splitquant import Entry

COMPARED = ("svdquant", "svdquant_r")
# Four columns more are 0.5 bits a weight at 256 x 256 channels and 0.31 at 256 x 1024; nvfp4's scales are
# 0.375 and 0.28.
MORE_RANK = 36
AGAINST = (*COMPARED, *(f"{name}, rank {MORE_RANK}" for name in COMPARED))


def entries() -> list[Entry]:
    """Each method as it is, on nvfp4, and with the rank that has nvfp4's bits; convrot, which has none,
    twice."""
    rows = [_entry(name) for name in COMPARED] + [_entry(name, grid=NVFP4) for name in COMPARED]
    rows += [_entry(name, rank=MORE_RANK) for name in COMPARED]
    return [*rows, _entry("convrot"), _entry("convrot", grid=NVFP4)]


def _entry(name, **options) -> Entry:
    method = METHODS[name]
    said = [f"{key} {value}" if key != "grid" else value for key, value in options.items()]
    return Entry(", ".join([name, *said]), replace(method, config=method.configured(**options)))
