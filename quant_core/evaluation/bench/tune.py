"""`--tune`: every candidate tile of a case's products is timed on this card, the fastest goes into the user's
cache."""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import astuple, fields
from typing import Any

import torch

from ....kernels.plan import lower
from ....kernels.target import Target
from ....kernels.tuning import Problem, Tile, TileCache, cache_for, candidates
from ...store.atomic import save_text
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


def tune(case: Case, column: Column, target: Target, dtype, device, clock=measure) -> dict:
    """Times the candidates of one product, saves the winner and returns what was found. Candidates that
    cannot be compiled or launched or whose output is wrong are recorded and passed over."""
    problem, cache = problem_of(case, column, target), cache_for(target)
    x, spec, tensors = layer_of(case, column, dtype, device)
    work = gemm_work(x, spec, tensors, column.target(target))
    tried, best, default = [], None, None
    for tile in candidates(target, problem):
        found: dict[str, Any] = {"tile": vars(tile).copy()}
        tried.append(found)
        with forced(cache, problem.key, tile):
            try:
                y = written(work)
                reason = fault(y, default, x, spec, tensors)
                if not reason:
                    default = y.clone() if len(tried) == 1 else default
                    found["ms"] = clock(work, device).ms
            except Exception as e:  # whatever a compiler raises: the other candidates are worth having
                reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        if reason:
            found["error"] = reason
            if x.is_cuda:
                # Raises if the device is lost, with which no candidate can be judged.
                torch.cuda.synchronize(device)
            continue
        if best is None or found["ms"] < best["ms"]:
            best = found
    if best is not None:
        save(cache, {problem.key: Tile(**best["tile"])})
    return {
        "key": problem.key,
        "case": case.name,
        "column": column.name,
        "best": best and best["tile"],
        "candidates": tried,
    }


def save(cache: TileCache, measured: Mapping[str, Tile]):
    """Adds to what is in the cache and in its file."""
    cache.put(dict(measured))
    tiles = {key: astuple(tile) for key, tile in cache.tiles.items()}
    save_text(cache.path, json.dumps({"fields": [f.name for f in fields(Tile)], "tiles": tiles}, indent=1))
