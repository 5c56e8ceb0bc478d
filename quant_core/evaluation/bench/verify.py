"""Whether a call gives what it should. Every case is compared before anything of it is timed.

Two comparisons: the layer at its own in-channels, few tokens and out-channels, with the naive operator on the
CPU (float64 inside); and the timed call itself with the eager path on the same device, whose 16-bit roundings
are its own, hence a looser bound.
"""

from dataclasses import asdict, dataclass

import torch

from ....kernels.quant_linear import eager, naive
from ....kernels.target import Target
from .cases import Case, Column, generator, random_input, random_tensors
from .ours import operator

ROWS = 64 + 3  # a tile of tokens and a rest
CHANNELS = 256
NAIVE_LIMIT, EAGER_LIMIT = 0.01, 0.02
WORST_LIMIT = 0.1  # one element, in units of the output's root mean square
# After a learned transform 0.06 % of 4-bit codes fall the other way: 0.015 of the output, and of 256 channels
# two steps are 0.13.
LEARNED_LIMIT, LEARNED_WORST = 0.03, 0.3


@dataclass(frozen=True)
class Check:
    """error: norm of the difference over the reference's norm. worst: largest difference over the reference's
    root mean square."""

    against: str
    error: float
    worst: float
    finite: bool
    limit: float
    worst_limit: float = WORST_LIMIT

    @property
    def ok(self) -> bool:
        return self.finite and self.error <= self.limit and self.worst <= self.worst_limit

    def to_json(self) -> dict:
        return asdict(self) | {"ok": self.ok}


class Difference:
    """Adds up a comparison piece by piece, so that no copy of a large output is made."""

    def __init__(self):
        self.square = self.signal = self.largest = 0.0
        self.count, self.finite = 0, True

    def add(self, reference: torch.Tensor, test: torch.Tensor):
        reference, test = reference.float(), test.to(reference.device).float()
        off = reference - test
        self.finite = self.finite and bool(torch.isfinite(test).all())
        self.square += float(off.square().sum(dtype=torch.float64))
        self.signal += float(reference.square().sum(dtype=torch.float64))
        self.largest = max(self.largest, float(off.abs().max()))
        self.count += off.numel()

    def check(self, against: str, limit: float, worst_limit: float = WORST_LIMIT) -> Check:
        rms = max((self.signal / max(self.count, 1)) ** 0.5, 1e-30)
        error = (self.square / max(self.count, 1)) ** 0.5 / rms
        return Check(against, error, self.largest / rms, self.finite, limit, worst_limit)


def ours(x, spec, tensors, target: Target, int8: bool):
    """The output under test."""
    return operator(x, spec, tensors, target, int8)


def against_naive(case: Case, column: Column, target: Target, dtype, device) -> Check:
    """The case's layer, cut to CHANNELS out-channels, on at most ROWS tokens."""
    spec = column.spec(min(case.n, CHANNELS), case.k)
    g = generator(case.k, "cpu")
    x, tensors = (
        random_input(min(case.m, ROWS), case.k, dtype, "cpu", g),
        random_tensors(spec, dtype, "cpu", g),
    )
    moved = {name: t.to(device) for name, t in tensors.items()}
    y = ours(x.to(device), spec, moved, column.target(target), column.int8)
    difference = Difference()
    difference.add(naive.quant_linear(x, spec, tensors), y)
    limits = (LEARNED_LIMIT, LEARNED_WORST) if column.learned else (NAIVE_LIMIT, WORST_LIMIT)
    return difference.check("naive", *limits)


def against_eager(y, x, spec, tensors, rows: int = 2048) -> Check:
    """y, the output of a timed call on x."""
    difference = Difference()
    for start in range(0, x.shape[0], rows):
        piece = slice(start, start + rows)
        difference.add(eager.quant_linear(x[piece], spec, tensors), y[piece])
    return difference.check("eager", EAGER_LIMIT)
