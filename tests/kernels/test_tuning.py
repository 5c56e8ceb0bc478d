"""Tiles fit their cards, and the user's cache of measured ones survives what happens to files."""

import json
import re
import warnings
from dataclasses import astuple, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comfyui_nibble.kernels import plan, tuning
from comfyui_nibble.kernels.dispatch import choose
from comfyui_nibble.kernels.operator.spec import ActivationSpec, WeightSpec
from comfyui_nibble.kernels.target import Target, interpreter
from comfyui_nibble.kernels.tuning import Problem, Tile, TileCache
from comfyui_nibble.quant_core.evaluation.bench.tune import save
from comfyui_nibble.quant_core.store import atomic
from comfyui_nibble.tests.kernels.layers import side_by_side

pytestmark = pytest.mark.quick

CARDS = [
    Target("cuda", a, triton)
    for triton in ((3, 6), (3, 9))
    for a in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121, 130)
]
CARDS += [Target("hip", a, (3, 6)) for a in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")]
ADA, HOPPER = Target("cuda", 89, (3, 6), "NVIDIA L4"), Target("cuda", 90, (3, 6))
PROBLEM = Problem("gemm_s4s4", 0, plan.CHANNEL, False, 4608, 3072, 1536)
DEFAULT, OTHER = tuning.candidates(ADA, PROBLEM)[:2]


def problems(spec, target, tokens):
    """The problems that a layer's launches look up."""
    for g in plan.lower(spec, target):
        yield Problem(g.kernel, g.planes, g.scales, g.swap, tokens, spec.out_features, g.row_bytes, g.block)


@settings(max_examples=200, deadline=None)
@given(
    target=st.sampled_from([*CARDS, interpreter()]),
    widths=st.lists(st.integers(1, 96).map(lambda n: 64 * n), min_size=1, max_size=9),
    bits=st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 3, 4, 8])),
    grouped=st.tuples(st.booleans(), st.booleans()),
    tokens=st.integers(1, 20000),
)
def test_every_tile_fits_its_card_and_its_problem(target, widths, bits, grouped, tokens):
    act = ActivationSpec(bits[1], "group" if grouped[0] else "token")
    spec = side_by_side(
        3072, *((w, act, WeightSpec(bits[0], "group" if grouped[1] else "channel")) for w in widths)
    )
    assume(choose(spec, target).path != "eager")
    for problem in problems(spec, target, tokens):
        tiles = (
            [tuning.interpreter_tile(problem)] if target.interpreted else tuning.candidates(target, problem)
        )
        assert len(set(tiles)) == len(tiles) >= 1
        for tile in tiles:
            assert tile.bk * (tile.bm * max(problem.planes, 1) + tile.bn) * tile.stages <= target.shared_bytes
            if tile.gluon and target.card.int4:  # several groups a step, and no rest
                assert tile.bk % max(problem.block, 32) == problem.row_bytes % tile.bk == 0
            else:
                if problem.scales == plan.GROUP:
                    assert tile.bk == problem.block
                assert problem.block % tile.bk == 0
            assert tile.bk >= (32 if target.backend == "cuda" else 16)
            assert all(n & (n - 1) == 0 for n in (tile.bm, tile.bn, tile.bk, tile.warps, tile.rank_block))


def test_few_tokens_take_low_tiles():
    for target in (t for t in CARDS if t.arch != 75):
        problem = next(
            problems(
                side_by_side(
                    3072, (3072, ActivationSpec(granularity="token"), WeightSpec(granularity="channel"))
                ),
                target,
                64,
            )
        )
        assert all(t.bm <= 64 for t in tuning.candidates(target, problem))


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [
        (1, 16),
        (16, 16),
        (17, 32),
        (4096, 4096),
        (4097, 8192),
        (4500, 8192),
        (4608, 8192),
        (8192, 8192),
        (8193, 16384),
    ],
)
def test_tokens_share_a_key_up_to_a_power_of_two(tokens, bucket):
    assert replace(PROBLEM, tokens=tokens).key == f"gemm_s4s4/0/0/{bucket}x3072x1536/0"


def test_everything_else_has_a_key_of_its_own():
    others = [
        {"kernel": "gemm_u4s4"},
        {"planes": 2},
        {"scales": plan.SLICE},
        {"channels": 3073},
        {"row_bytes": 1535},
        {"block": 32},
    ]
    assert len({PROBLEM.key, *(replace(PROBLEM, **change).key for change in others)}) == 7


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The file that stands for the cache of every card."""
    path = tmp_path / "deep" / "tiles.json"
    monkeypatch.setattr(tuning, "cache_path", lambda target: path)
    tuning.cache_for.cache_clear()
    yield path
    tuning.cache_for.cache_clear()


def test_measured_tile_is_taken_by_every_problem_of_its_key(cache):
    assert tuning.gemm_tile(ADA, PROBLEM) == DEFAULT
    save(tuning.cache_for(ADA), {PROBLEM.key: OTHER})
    assert tuning.gemm_tile(ADA, PROBLEM) == OTHER
    tuning.cache_for.cache_clear()
    assert tuning.gemm_tile(ADA, replace(PROBLEM, tokens=5000)) == OTHER
    assert tuning.gemm_tile(ADA, replace(PROBLEM, tokens=100)) != OTHER


def test_cached_tile_that_is_no_candidate_is_ignored(cache):
    for strange in (replace(OTHER, bk=4096), replace(OTHER, warps=3), Tile(0, 0, 0, 0, 0)):
        save(tuning.cache_for(ADA), {PROBLEM.key: strange})
        tuning.cache_for.cache_clear()
        assert tuning.gemm_tile(ADA, PROBLEM) == DEFAULT


def test_round_trip_and_addition(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(TileCache(cache), {"a": DEFAULT})
        save(TileCache(cache), {"b": OTHER})
        assert TileCache(cache).tiles == {"a": DEFAULT, "b": OTHER}
        save(TileCache(cache), {"a": OTHER})
        assert TileCache(cache).tiles == {"a": OTHER, "b": OTHER}
        assert TileCache(cache).get("c") is None
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


FIELDS = '"fields": ["bm", "bn", "bk", "warps", "stages", "group_m", "rank_block"]'
CORRUPT = {
    "empty": "",
    "cut short": '{"fields": ["bm", "bn"',
    "not UTF-8": b"\xff\xfe\x00",
    "a list": "[]",
    "no tiles": "{" + FIELDS + "}",
    "no fields": '{"tiles": {"k": [64, 64, 64, 4, 3, 8, 32]}}',
    "an unknown field": '{"fields": ["bm", "bn", "bk", "warps", "stages", "group_m", "clusters"], "tiles": {"k": [64, 64, '
    "64, 4, 3, 8, 32]}}",
    "a missing field": '{"fields": ["bm", "bn", "bk", "warps"], "tiles": {"k": [64, 64, 64, 4]}}',
    "too few values": "{" + FIELDS + ', "tiles": {"k": [64, 64, 64]}}',
    "tiles in a list": "{" + FIELDS + ', "tiles": [[64, 64, 64, 4, 3, 8, 32]]}',
    "words": "{" + FIELDS + ', "tiles": {"k": [64, 64, "wide", 4, 3, 8, 32]}}',
    "null": "{" + FIELDS + ', "tiles": {"k": [64, 64, null, 4, 3, 8, 32]}}',
    "infinity": "{" + FIELDS + ', "tiles": {"k": [64, 64, 1e999, 4, 3, 8, 32]}}',
    "a number": "{" + FIELDS + ', "tiles": {"k": 64}}',
}


@pytest.mark.parametrize("text", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_file_warns_and_is_replaced(cache, text):
    cache.parent.mkdir()
    cache.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(
        UserWarning,
        match=rf"{re.escape(str(cache))}: not a table of tiles \(.*\); the shipped defaults are used",
    ):
        assert tuning.gemm_tile(ADA, PROBLEM) == DEFAULT
    save(tuning.cache_for(ADA), {PROBLEM.key: OTHER})
    assert json.loads(cache.read_text())["tiles"] == {PROBLEM.key: list(astuple(OTHER))}
    assert TileCache(cache).tiles == {PROBLEM.key: OTHER}


def test_fields_are_read_by_name(cache):
    cache.parent.mkdir()
    cache.write_text(
        '{"fields": ["stages", "warps", "bk", "bn", "bm"], "tiles": {"k": [3, 8, 64, 256, 128]}}'
    )
    assert TileCache(cache).get("k") == Tile(128, 256, 64, 8, 3)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_save_leaves_the_old_file(cache, monkeypatch, step):
    def fail(*args):
        raise OSError("disk full")

    save(TileCache(cache), {"a": DEFAULT})
    before = cache.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            save(TileCache(cache), {"a": OTHER})
    assert cache.read_bytes() == before
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


def test_each_card_and_triton_has_a_file_of_its_own():
    cards = [ADA, replace(ADA, triton=(3, 7)), replace(ADA, name="NVIDIA L40S"), HOPPER, CARDS[-1]]
    names = [tuning.cache_path(card).name for card in cards]
    assert names[0] == "tiles-nvidia-l4-89-triton3-6.json"
    assert names[3] == "tiles-sm_90-90-triton3-6.json"
    assert len(set(names)) == len(cards)
