"""Tuning: every candidate tile of a case's products is timed on this card, the fastest goes into the user's
cache."""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import astuple, fields

import torch

from ....kernels.plan import lower
from ....kernels.target import Target
from ....kernels.tuning import Problem, Tile, TileCache, cache_for, candidates
from ...store.atomic import save_text
from .answers import Wrong
from .cases import RANK, Case, Column
from .ours import gemm_work, layer_of
from .timing import Work, measure
from .verify import Difference, against_eager

# Of the difference from the default tile's output: the same integer sums, in another order of 32-bit
# additions.
DEFAULT_LIMIT = 1e-3


def problem_of(case: Case, column: Column, target: Target) -> Problem:
    """What `launch.gemm` looks up for this column's product."""
    (step,) = lower(column.spec(case.n, case.k), column.target(target))
    return Problem(
        step.kernel, step.planes, step.scales, step.swap, case.m, case.n, step.row_bytes, step.block
    )


def tuned_columns(columns) -> list[Column]:
    """One column a tile: a plain product takes the tile of the operator, so that is timed with its low-rank
    branch and bias."""
    return [c for c in columns if (c.kind == "operator" and c.rank == RANK) or c.slices > 1]


@contextmanager
def forced(cache: TileCache, key: str, tile: Tile):
    """Launches take this tile while it lasts; the file is not touched."""
    before = cache.get(key)
    cache.put({key: tile})
    try:
        yield
    finally:
        cache.put({key: before})


def written(work: Work) -> torch.Tensor:
    """The output of a call. What the call does not write is NaN, not the right value of an earlier one."""
    work.call(*work.operands).fill_(float("nan"))
    return work.call(*work.operands)


def fault(y, default, x, spec, tensors, rows: int = 2048) -> str:
    """What is wrong with an output, "" if nothing. default: the default tile's, None where there is none."""
    check = against_eager(y, x, spec, tensors)
    if not check.ok:
        return f"wrong output: relative error {check.error:.3g}"
    if default is not None:
        difference = Difference()
        for start in range(0, y.shape[0], rows):
            difference.add(default[start : start + rows], y[start : start + rows])
        check = difference.check("default", DEFAULT_LIMIT)
    return "" if check.ok else f"wrong output: relative error {check.error:.3g} against the default tile"


class Candidates:
    """The product of a case with one tile after another: each is compared, then timed, and the fastest kept.

    `done`: what is known of other tiles of the same product, {"tile", "ms"} each, all with a right output.
    """

    def __init__(self, case: Case, column: Column, target: Target, dtype, device, clock=measure):
        self.problem, self.cache = problem_of(case, column, target), cache_for(target)
        self.target, self.device, self.clock = target, device, clock
        self.layer = layer_of(case, column, dtype, device)
        self.work = gemm_work(*self.layer, column.target(target))
        self.default: torch.Tensor | None = None

    def time(self, tile: Tile, done: list[dict]) -> dict:
        """{"tile", "ms", "best"}. Raises Wrong for a wrong output, and whatever a compiler raises."""
        x, spec, tensors = self.layer
        first = candidates(self.target, self.problem)[0]
        if self.default is None and tile != first and vars(first) in [d["tile"] for d in done]:
            with forced(self.cache, self.problem.key, first):
                self.default = written(self.work).clone()  # the next call writes to the same place
        with forced(self.cache, self.problem.key, tile):
            y = written(self.work)
            if reason := fault(y, self.default, x, spec, tensors):
                raise Wrong(reason)
            if tile == first:
                self.default = y.clone()
            found = {"tile": vars(tile).copy(), "ms": self.clock(self.work, self.device).ms}
        best = min([*done, found], key=lambda d: d["ms"])
        save(self.cache, {self.problem.key: Tile(**best["tile"])})
        return found | {"best": best["tile"]}


def text_of(tile: Tile) -> str:
    """E.g. "128 x 128 x 64, 8 warps, 3 stages"."""
    rest = "" if tile.group_m == 8 else f", walk {tile.group_m}"
    rest += ", Gluon" if tile.gluon else ""
    rank = "" if tile.rank_block == 32 else f", rank {tile.rank_block}"
    size = f"{tile.bm} x {tile.bn} x {tile.bk}"
    return f"{size}, {tile.warps} warps, {tile.stages} stages{rank}{rest}"


def save(cache: TileCache, measured: Mapping[str, Tile]):
    """Adds to what is in the cache and in its file."""
    cache.put(dict(measured))
    tiles = {key: astuple(tile) for key, tile in cache.tiles.items()}
    save_text(cache.path, json.dumps({"fields": [f.name for f in fields(Tile)], "tiles": tiles}, indent=1))
