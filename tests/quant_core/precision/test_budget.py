"""Which units are raised: the choice on numbers, against exhaustive search."""

import itertools
import math
import random

import pytest

from comfyui_nibble.quant_core.precision.budget import (
    BudgetError,
    Unit,
    Upgrade,
    decibel,
    for_memory,
    for_quality,
)

pytestmark = pytest.mark.quick


def unit(name, noise, *options, layers=1):
    return Unit(name, noise, tuple(Upgrade(*o) for o in options), layers)


def total(units, chosen):
    """(extra bytes, noise) of a choice."""
    noise = sum(chosen[u.name].noise if u.name in chosen else u.noise for u in units)
    return sum(o.extra for o in chosen.values()), noise


def exhaustive(units, budget):
    """The least noise at `budget` bytes more or less, where no unit may get worse."""
    menus = [[(0, u.noise), *((o.extra, o.noise) for o in u.upgrades if o.noise < u.noise)] for u in units]
    sums = ((sum(e for e, _ in pick), sum(n for _, n in pick)) for pick in itertools.product(*menus))
    return min(n for e, n in sums if e <= budget)


def random_units(seed, count=6, smaller=False):
    r, units = random.Random(seed), []
    for i in range(count):
        noise = r.uniform(0.002, 0.05)
        w8 = r.randint(-30, 100) if smaller else r.randint(1, 100)
        options = [
            ("W4A8", 0, noise * r.uniform(0.2, 1.2)),
            ("W8A8", w8, noise * r.uniform(0.0, 1.1)),
            ("16 bit", w8 + r.randint(1, 200), 0.0),
        ]
        units.append(unit(f"u{i}", noise, *options))
    return units


@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_memory_is_the_optimum(seed, smaller):
    units = random_units(seed, smaller=smaller)
    for budget in (0, 1, 37, 150, 400, 10**6):
        chosen = for_memory(units, budget)
        extra, noise = total(units, chosen)
        assert extra <= budget
        assert math.isclose(noise, exhaustive(units, budget), rel_tol=1e-12, abs_tol=1e-15)
        assert all(chosen[u.name].noise < u.noise for u in units if u.name in chosen)


@pytest.mark.parametrize("seed", range(10))
def test_coarse_steps_cost_at_most_one_a_unit(seed):
    units = random_units(seed)
    units = [
        Unit(u.name, u.noise, tuple(Upgrade(o.precision, o.extra * 1000, o.noise) for o in u.upgrades))
        for u in units
    ]
    budget, steps = 400_000, 64
    extra, noise = total(units, for_memory(units, budget, steps))
    assert extra <= budget
    assert noise <= exhaustive(units, budget - len(units) * math.ceil(budget / steps)) + 1e-15


def test_greedy_by_noise_a_byte_would_be_worse():
    """The best ratio first takes u0 and leaves 9 of 10 bytes unused; the optimum takes u1."""
    units = [unit("u0", 0.02, ("W8A8", 1, 0.0)), unit("u1", 0.10, ("W8A8", 10, 0.0))]
    assert list(for_memory(units, 10)) == ["u1"]


def test_no_memory_still_takes_what_costs_none():
    units = [
        unit("a", 0.03, ("W4A8", 0, 0.02), ("W8A8", 64, 0.001)),
        unit("b", 0.02, ("W4A8", 0, 0.02)),  # no better: stays
        unit("c", 0.01, ("W4A8", 0, 0.012), ("16 bit", 8, 0.0)),  # worse: stays
    ]
    assert {n: o.precision for n, o in for_memory(units, 0).items()} == {"a": "W4A8"}
    assert {n: o.precision for n, o in for_memory(units, 71).items()} == {"a": "W8A8"}
    assert {n: o.precision for n, o in for_memory(units, 72).items()} == {"a": "W8A8", "c": "16 bit"}
    assert for_memory([], 5) == for_quality([], 20) == {}


def test_bytes_saved_in_one_unit_are_spent_in_another():
    units = [unit("a", 0.02, ("W8A8", -10, 0.01)), unit("b", 0.03, ("W8A8", 10, 0.001))]
    assert {n: o.precision for n, o in for_memory(units, 0).items()} == {"a": "W8A8", "b": "W8A8"}


def test_quality_takes_the_cheapest_that_reaches_it():
    units = [
        unit("at it", 0.01, ("W8A8", -5, 0.001)),  # 20 dB: stays, though smaller and better is to be had
        unit("a little", 0.012, ("W4A8", 0, 0.009), ("W8A8", 10, 0.0001)),
        unit("more", 0.03, ("W4A8", 0, 0.02), ("W8A8", 10, 0.001), ("16 bit", 30, 0.0)),
        unit("never", 0.04, ("W4A8", 0, 0.03), ("W8A8", 10, 0.02)),
        unit("worse", 0.05, ("W4A8", 0, 0.06)),
    ]
    assert {n: o.precision for n, o in for_quality(units, 20).items()} == {
        "a little": "W4A8",
        "more": "W8A8",
        "never": "W8A8",
    }


def test_quality_of_a_block_is_that_of_its_mean_noise():
    three = lambda noise: unit("block", noise, ("W8A8", 10, 0.0), layers=3)
    assert for_quality([three(0.0299)], 20) == {}
    assert list(for_quality([three(0.0301)], 20)) == ["block"]


def test_budgets_that_mean_nothing():
    for target in (0, -3, math.nan, math.inf):
        with pytest.raises(BudgetError, match="SQNR above 0 dB"):
            for_quality([], target)
    with pytest.raises(BudgetError, match="memory budget must be 0 or more, found -1 bytes"):
        for_memory([], -1)


def test_decibel():
    assert decibel(0.01) == pytest.approx(20)
    assert decibel(0.0) == math.inf
