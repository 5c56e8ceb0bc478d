"""`--tune`: every candidate tile of a case's products is timed on this card, the fastest goes into the user's cache."""

from contextlib import contextmanager

from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ..plan import lower
from ..target import Target
from ..tuning import Problem, Tile, TileCache, cache_for, candidates
from .cases import Case, Column
from .ours import gemm_work, layer_of
from .timing import measure
from .verify import against_eager


def problem_of(case: Case, column: Column, target: Target) -> Problem:
    """What `launch.gemm` looks up for this column's product."""
    (step,) = lower(column.spec(case.n, case.k), column.target(target))
    return Problem(step.kernel, step.planes, step.scales, step.swap, case.m, case.n, step.row_bytes, step.block)


def tuned_columns(columns) -> list[Column]:
    """One column a tile: a plain product takes the tile of the operator, so that is timed with its low-rank branch and bias."""
    return [c for c in columns if c.kind == "operator" or c.slices > 1]


@contextmanager
def forced(cache: TileCache, key: str, tile: Tile):
    """Launches take this tile while it lasts; the file is not touched."""
    before = cache.tiles.get(key)
    cache.tiles[key] = tile
    try:
        yield
    finally:
        if before is None:
            del cache.tiles[key]
        else:
            cache.tiles[key] = before


def tune(case: Case, column: Column, target: Target, dtype, device, clock=measure) -> dict:
    """Times the candidates of one product, saves the winner and returns what was found. Candidates that cannot be launched or whose
    output is wrong are recorded and passed over."""
    problem, cache = problem_of(case, column, target), cache_for(target)
    x, spec, tensors = layer_of(case, column, dtype, device)
    work = gemm_work(x, spec, tensors, column.target(target))
    tried, best = [], None
    for tile in candidates(target, problem):
        found = {"tile": vars(tile).copy()}
        tried.append(found)
        with forced(cache, problem.key, tile):
            try:
                check = against_eager(work.call(*work.operands), x, spec, tensors)
                if not check.ok:
                    found["error"] = f"wrong output: relative error {check.error:.3g}"
                    continue
                found["ms"] = clock(work, device).ms
            except (OutOfResources, CompilationError, PTXASError) as e:
                found["error"] = f"{type(e).__name__}: {e}"
                continue
        if best is None or found["ms"] < best["ms"]:
            best = found
    if best is not None:
        cache.save({problem.key: Tile(**best["tile"])})
    return {"key": problem.key, "case": case.name, "column": column.name, "best": best and best["tile"], "candidates": tried}
