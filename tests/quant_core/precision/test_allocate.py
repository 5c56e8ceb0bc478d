"""The choice under a budget, on numbers: against exhaustive search."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_nibble.quant_core.precision.allocate import (
    Budget,
    allocate,
    pareto,
    parse_budget,
    reference_cost,
    uniform,
)
from comfyui_nibble.quant_core.precision.budget import BudgetError, Totals
from comfyui_nibble.quant_core.precision.measured import Measured, Option


def layer(name, n, k, *options, fixed=False):
    """options: (entry, noise, bytes, activation bits, weight bits). The cost is 2 a weight, 1 at 2 activation
    bits and 4 in 16 bit."""
    made = {
        entry: Option(noise, nbytes, a, w, {2: 1.0, 16: 4.0}.get(a, 2.0) * n * k)
        for entry, noise, nbytes, a, w in options
    }
    return Measured(name, "b", k, n, fixed, made)


def random_table(seed, layers=5, bits=(2, 3, 4, 8)):
    r, table = random.Random(seed), []
    for i in range(layers):
        n, k, noise = 64 * r.randint(1, 12), 64 * r.randint(1, 6), r.uniform(0.01, 0.1)
        options = [
            (
                f"A{b}",
                noise * r.uniform(0.6, 1) / 2**b,
                n * k // 4 + r.randint(0, 50) * b,
                b,
                r.choice((2, 4)),
            )
            for b in bits
        ]
        table.append(layer(f"l{i}", n, k, *options))
    return table


def exhaustive(table, budget, weights=None, held=0):
    """(least noise, what it reaches) of all assignments that meet the budget, None where none does; and all
    that can be reached."""
    best, reachable, weights = None, set(), weights or {}
    for pick in itertools.product(*(s.options.values() for s in table)):
        if budget.kind == "memory":
            reached = held + sum(c.nbytes for c in pick)
        elif budget.kind == "speed":
            quantized = [[c.cost for c in s.options.values() if c.activation_bits < 16] for s in table]
            reached = sum(c.cost for c in pick) / sum(map(max, quantized))
        else:
            reached = sum(budget.of(c) * s.weights for c, s in zip(pick, table, strict=True)) / sum(
                s.weights for s in table
            )
        noise = sum(weights.get(s.name, 1) * c.noise for c, s in zip(pick, table, strict=True))
        reachable.add(reached)
        low = -math.inf if budget.kind in ("memory", "speed") else 0.99 * budget.value
        if low <= reached <= budget.value * (1 + 1e-9) and (best is None or noise < best):
            best = noise
    return best, sorted(reachable)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["activation", "weight", "memory", "speed"]),
    st.floats(0.02, 1.1),
    st.booleans(),
)
def test_equals_exhaustive_search(seed, kind, place, weighted):
    """Also that a budget is refused exactly where nothing meets it, with the closest two that can be met."""
    table = random_table(seed, bits=(2, 3, 4, 16))
    weights = {f"l{i}": i + 0.5 for i in range(0, 5, 2)} if weighted else None
    _, reachable = exhaustive(table, Budget(kind, 1.0))
    budget = Budget(kind, reachable[0] * 0.97 + place * (reachable[-1] - reachable[0]))
    best, reachable = exhaustive(table, budget, weights)
    if best is None:
        below, above = (
            [r for r in reachable if r <= budget.value][-2:],
            [r for r in reachable if r > budget.value][:2],
        )
        two = below[-1:] + above[:1] if below and above else below or above
        with pytest.raises(BudgetError) as error:
            allocate(table, budget, weights)
        assert f"closest that can be met: {' and '.join(budget.text(v) for v in two)}." in str(error.value)
        return
    found = allocate(table, budget, weights)
    assert math.isclose(found.noise, best, rel_tol=1e-12)
    assert found.reached <= budget.value * (1 + 1e-5)
    options = [s.options[found.layers[s.name]] for s in table]
    assert math.isclose(
        found.noise,
        sum((weights or {}).get(s.name, 1) * c.noise for s, c in zip(table, options, strict=True)),
    )
    assert found.cost == sum(c.cost for c in options)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("activation", 0.2),
        ("activation", 0.6),
        ("memory", 0.3),
        ("memory", 0.9),
        ("speed", 0.1),
        ("speed", 0.7),
    ],
)
def test_budget_is_met_within_one_percent(seed, kind, share):
    """228 layers, bytes without a common step."""
    table = random_table(seed, 228, (2, 3, 8, 16))
    low, high = (uniform(table, e, Budget(kind, 1)).reached for e in ("A2", "A16"))
    budget = Budget(kind, low + share * (high - low))
    assert 0.99 * budget.value <= allocate(table, budget).reached <= budget.value * (1 + 1e-5)


def test_steps_cost_at_most_one_a_layer(monkeypatch):
    from comfyui_nibble.quant_core.precision import allocate as module

    table = random_table(3)
    budget = Budget("memory", uniform(table, "A3", Budget("memory", 1)).reached)
    exact = allocate(table, budget)
    monkeypatch.setattr(module, "STEPS", 64)
    problem = module._Problem(table, budget, {}, 0)
    coarse = allocate(table, budget)
    assert (
        exact.noise
        <= coarse.noise
        <= allocate_at(table, budget.value - 5 * problem.step, monkeypatch, module).noise + 1e-15
    )
    assert coarse.reached <= budget.value


def allocate_at(table, value, monkeypatch, module):
    monkeypatch.setattr(module, "STEPS", 2**16)
    return allocate(table, Budget("memory", value))


TABLE = [
    layer("a", 64, 64, ("A2", 0.10, 10, 2, 2), ("A4", 0.01, 20, 4, 2)),
    layer("b", 64, 64, ("A2", 0.03, 10, 2, 2), ("A4", 0.02, 20, 4, 2)),
    layer("mod", 64, 64, ("W4A16", 0.5, 7, 16, 4), fixed=True),
]


def test_the_layer_that_gains_most_is_raised():
    assert allocate(TABLE, Budget("activation", 3)).layers == {"a": "A4", "b": "A2"}
    assert allocate(TABLE, Budget("activation", 3), {"a": 0.1}).layers == {
        "a": "A2",
        "b": "A4",
    }  # 0.009 against 0.01
    assert allocate(TABLE, Budget("activation", 4)).layers == {"a": "A4", "b": "A4"}


def test_memory_pays_for_what_has_no_choice():
    """Two layers, 7 bytes of the weight-only one and 100 beside the table."""
    assert allocate(TABLE, Budget("memory", 137), held=100).reached == 137
    assert allocate(TABLE, Budget("memory", 137), held=100).layers == {"a": "A4", "b": "A2"}
    assert allocate(TABLE, Budget("memory", 10**6), held=100).reached == 147
    with pytest.raises(
        BudgetError, match=r"2 layers meets 0.126 KB\. The closest that can be met: 0.127 KB and 0.137 KB"
    ):
        allocate(TABLE, Budget("memory", 126), held=100)


@pytest.mark.parametrize(
    ("bits", "closest"),
    [(1, "2 activation bits on average and 3 act"), (2.5, "2 act.* and 3 act"), (5, "3 act.* and 4 act")],
)
def test_average_that_nothing_meets(bits, closest):
    with pytest.raises(
        BudgetError,
        match=f"no assignment of the 2 layers meets {bits:g} activation bits.* The closest that can be met: "
        f"{closest}",
    ):
        allocate(TABLE, Budget("activation", bits))


def test_speed_is_relative_to_the_most_expensive_quantized_entry():
    """Weights 4096 and 8192: a at int4 and b at int8 are (1 + 2 2) / (2 + 2 2) of all int8."""
    table = [
        layer("a", 64, 64, ("A2", 0.10, 10, 2, 2), ("A4", 0.01, 20, 4, 2), ("16 bit", 0.0, 80, 16, 16)),
        layer("b", 64, 128, ("A2", 0.30, 10, 2, 2), ("A4", 0.02, 20, 4, 2), ("16 bit", 0.0, 80, 16, 16)),
        layer("mod", 640, 64, ("W4A16", 0.5, 7, 16, 4), fixed=True),
    ]
    assert [reference_cost(s) for s in table[:2]] == [2 * 4096, 2 * 8192]
    found = allocate(table, Budget("speed", 0.9))
    assert (found.layers, found.reached) == ({"a": "A2", "b": "A4"}, pytest.approx(5 / 6))
    assert uniform(table, "A2", Budget("speed", 1)).reached == 0.5
    assert uniform(table, "16 bit", Budget("speed", 1)).reached == 2
    assert allocate(table, Budget("speed", 9)).layers == {"a": "16 bit", "b": "16 bit"}
    with pytest.raises(
        BudgetError,
        match=r"meets 0.4x the .* met: 0.5x the reference cost and 0.6667x the reference cost\. 1x is the "
        r"cost by",
    ):
        allocate(table, Budget("speed", 0.4))
    curve = pareto(table, Budget("speed", 1))
    assert curve[0] == (0.5, pytest.approx(0.4))
    assert curve[-1] == (2, 0)


def test_menu_without_a_choice_of_speed_says_so():
    """RobuQ's layers are int8 products at every width: only 1x can be met from below."""
    table = [layer("a", 64, 64, ("A3", 0.1, 10, 3, 2), ("A4", 0.01, 20, 4, 2))]
    assert allocate(table, Budget("speed", 1)).layers == {"a": "A4"}
    with pytest.raises(BudgetError, match="closest that can be met: 1x the reference cost. 1x is"):
        allocate(table, Budget("speed", 0.9))


def test_nothing_to_allocate():
    with pytest.raises(BudgetError, match="no layer has quantized activations"):
        allocate(TABLE[2:], Budget("activation", 3))


def test_pareto_is_the_optimum_of_every_budget():
    table = random_table(1)
    budget = Budget("memory", 1)
    curve = pareto(table, budget)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(curve))
    for value, noise in curve:
        assert math.isclose(noise, exhaustive(table, Budget("memory", value))[0], rel_tol=1e-12)
    assert curve[0][0] == min(
        sum(c.nbytes for c in pick) for pick in itertools.product(*(s.options.values() for s in table))
    )


def test_uniform():
    both = uniform(TABLE, "A4", Budget("activation", 1))
    assert (both.reached, both.noise, both.layers) == (4, pytest.approx(0.03), {"a": "A4", "b": "A4"})


def test_totals_trace():
    totals = Totals.of([[(0, 5.0), (2, 1.0)], [(0, 3.0), (1, 2.0)]], 3)
    assert totals.noise.tolist() == [8, 7, 4, 3]
    assert [totals.trace(t) for t in range(4)] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert totals.best(0, 1) == 1
    assert Totals.of([[(0, 1.0), (2, 0.5)]], 3).best(1, 1) is None


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("A3", Budget("activation", 3)),
        ("w2.5", Budget("weight", 2.5)),
        ("600MB", Budget("memory", 6e8)),
        ("6.5 GiB", Budget("memory", 6.5 * 2**30)),
        ("0.9x", Budget("speed", 0.9)),
        ("80 %", Budget("speed", 0.8)),
    ],
)
def test_budgets_as_text(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["", "3", "A", "A0", "A1.2.3", "12 potatoes", "-4GB", "A.", "MB", "x", "0x", "A3x", "3%%"]
)
def test_budgets_that_mean_nothing(text):
    with pytest.raises(
        BudgetError, match="expected an average of bits.* or a cost such as 0.8x or 80%. 1x is"
    ):
        parse_budget(text)
