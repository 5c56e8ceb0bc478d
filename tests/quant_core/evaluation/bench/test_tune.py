"""Tuning keeps the fastest tile whose output is right: a candidate that is wrong, writes nothing or fails
is never saved."""

from types import SimpleNamespace

import pytest
import torch

from comfyui_nibble.kernels import tuning
from comfyui_nibble.kernels.quant_linear import eager
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.kernels.tuning import Tile
from comfyui_nibble.quant_core.evaluation.bench import cases, tune
from comfyui_nibble.quant_core.evaluation.bench.timing import Work

HOPPER = Target("cuda", 90, (3, 6))
CASE, COLUMN = (
    cases.Case("tiny", 48, 256, 100),
    cases.Column("operator", "operator", "channel", rank=cases.RANK),
)
DEFAULT, GLUON = [
    next(t for t in tuning.candidates(HOPPER, tune.problem_of(CASE, COLUMN, HOPPER)) if t.gluon is gluon)
    for gluon in (False, True)
]


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A function: what `tune` returns where launches with a Gluon tile are done by `gluon(y)`, on the right
    output, and the others are right and slower; and the tile in the cache's file."""
    monkeypatch.setattr(tuning, "cache_path", lambda target: tmp_path / "tiles.json")
    tuning.cache_for.cache_clear()

    def run(gluon, anew=False):
        key = tune.problem_of(CASE, COLUMN, HOPPER).key
        taken = lambda: tuning.cache_for(HOPPER).get(key)

        def gemm_work(x, spec, tensors, target):
            right = eager.quant_linear(x, spec, tensors)
            y = torch.empty_like(right)

            def call(x):
                if taken().gluon:
                    gluon(y, right)
                else:
                    y.copy_(right)
                return y

            return Work(call, (x,))

        monkeypatch.setattr(tune, "gemm_work", gemm_work)
        clock = lambda work, device: SimpleNamespace(ms=1.0 if taken().gluon else 2.0)
        make = lambda: tune.Candidates(CASE, COLUMN, HOPPER, torch.bfloat16, torch.device("cpu"), clock)
        done, tried, product = [], [], make()
        for tile in tuning.candidates(HOPPER, product.problem):
            if anew:  # as in a process that has taken the place of one that was lost
                product = make()
            try:
                done.append(product.time(tile, list(done)))
                tried.append(done[-1])
            except Exception as error:
                tried.append({"tile": vars(tile).copy(), "error": f"{type(error).__name__}: {error}"})
        return {"candidates": tried, "best": done[-1]["best"]}, tuning.TileCache(tmp_path / "tiles.json").get(
            key
        )

    yield run
    tuning.cache_for.cache_clear()


def by_kind(found, gluon):
    return [c for c in found["candidates"] if c["tile"]["gluon"] is gluon]


def test_right_candidate_that_is_faster_is_saved(tuned):
    found, saved = tuned(lambda y, right: y.copy_(right))
    assert saved == Tile(**found["best"]) == GLUON
    assert all(c["ms"] == 1.0 for c in by_kind(found, True))


def one_bad_row(y, right):
    y.copy_(right)
    y[-1] = 0


def slightly_off(y, right):
    """Within the limits against the eager path, which has roundings of its own."""
    y.copy_(right.float() * 1.005)


def unsupported(y, right):
    raise RuntimeError("PassManager::run failed")


@pytest.mark.parametrize(
    ("gluon", "words"),
    [
        (one_bad_row, "wrong output: relative error"),
        (lambda y, right: y[:90].copy_(right[:90]), "wrong output: relative error nan"),
        (lambda y, right: None, "wrong output: relative error nan"),
        (slightly_off, "against the default tile"),
        (unsupported, "RuntimeError: PassManager::run failed"),
    ],
    ids=["a bad row", "rows left out", "nothing written", "slightly off", "cannot be compiled"],
)
@pytest.mark.parametrize("anew", [False, True])
def test_faster_candidate_that_is_wrong_is_never_saved(tuned, gluon, words, anew):
    found, saved = tuned(gluon, anew)
    assert saved == Tile(**found["best"]) == DEFAULT
    assert all(c["ms"] == 2.0 for c in by_kind(found, False))
    assert by_kind(found, True)
    assert all(words in c["error"] and "ms" not in c for c in by_kind(found, True))
