"""Which precision each layer takes under a budget: RobuQ's AMPN (ICML 2026), for any menu of methods and
widths.

The noise-to-signal ratios of the layers' outputs are summed, as AMPN sums its sensitivities, each times a
weight, and the sum is minimised by exact dynamic programming (`budget.Totals`, which Nibble Guard uses too).
Without the weights of `gains.measure` pictures of the small FLUX at 2 activation bits on average are 2.4 dB
worse than at 2 bits in every layer (2.1 to 2.8, 44 of 48 pictures), with them 2.3 dB better (0.9 to 2.9, 41).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from ..calibration.file import Calibration
from ..families import Layer
from ..run.layers import not_quantizable
from ..run.source import Source, rest_of
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from .budget import BudgetError, Totals
from .measured import Measured, Option
from .menu import MixedConfig
from .sensitivity import sensitivity

STEPS = 2**16
NEAR = 0.99  # an average counts as met from here on
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ONE_X = (
    "1x is the cost by the speed proxy (multiply-adds at the peak rates of int4, int8 and 16 bit) with "
    "every layer at its most expensive "
    "quantized entry: int8 products. All W4A4 is 0.5x, all 16 bit 2x."
)


@dataclass(frozen=True)
class Budget:
    """kind: "activation" or "weight", value bits on average over the weights of the layers that the menu is
    for, "memory", bytes, or "speed", the cost of the speed proxy (`measured.relative_cost`) as a multiple
    of `reference_cost`.

    An average counts a layer by its in-channels times out-channels, its multiply-adds a token. Bits are those
    of the codes; side data, such as scales and low rank, count as memory only.
    """

    kind: str
    value: float

    @property
    def average(self) -> bool:
        return self.kind in ("activation", "weight")

    def of(self, option: Option) -> float:
        return {
            "activation": option.activation_bits,
            "weight": option.weight_bits,
            "memory": option.nbytes,
            "speed": option.cost,
        }[self.kind]

    def text(self, value: float | None = None) -> str:
        """E.g. "3.02 activation bits on average", "61.3 MB", "0.8x the reference cost"."""
        value = self.value if value is None else value
        if self.kind == "speed":
            return f"{value:.4g}x the reference cost"
        if self.kind == "memory":
            unit = next((u for u in ("GB", "MB") if value >= _UNITS[u]), "KB")
            return f"{value / _UNITS[unit]:.4g} {unit}"
        return f"{value:.4g} {self.kind} bits on average"

    def short(self, value: float) -> str:
        """E.g. "3.02", "61.3 MB", "0.8x"."""
        return self.text(value) if self.kind == "memory" else self.text(value).split()[0]


def reference_cost(layer: Measured) -> float:
    """What 1x of a speed budget is for a layer: its most expensive quantized entry, an int8 product under the
    menus of `mixed`.

    All W4A4 is 0.5x then, all 16 bit 2x. A menu of 16 bit alone is its own reference.
    """
    quantized = [c.cost for c in layer.options.values() if c.activation_bits < 16]
    return max(quantized or [c.cost for c in layer.options.values()])


def parse_budget(text: str) -> Budget:
    """A Budget of "A3" or "W2.5", bits on average, of "600MB", "6.5 GB", "900 MiB", or of "0.8x", "80%", a
    cost. Raises BudgetError otherwise."""
    match = re.fullmatch(
        r"(?P<kind>[AW])?\s*(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)\s*(?P<unit>[KMG]i?B|x|%)?",
        text.strip(),
        re.IGNORECASE,
    )
    if not match or bool(match["kind"]) == bool(match["unit"]) or float(match["number"]) <= 0:
        raise BudgetError(
            f"budget {text!r}: expected an average of bits, A3 for activations or W2.5 for weights, a size "
            "such as 600MB or 6.5GB, or a cost "
            f"such as 0.8x or 80%. {ONE_X}"
        )
    number, unit = float(match["number"]), (match["unit"] or "").upper()
    if match["kind"]:
        return Budget({"A": "activation", "W": "weight"}[match["kind"].upper()], number)
    if unit in ("X", "%"):
        return Budget("speed", number / (100 if unit == "%" else 1))
    return Budget("memory", number * _UNITS[unit])


@dataclass(frozen=True)
class Allocation:
    """layers: {layer: entry}; reached: what the budget measures, in its unit; noise: the weighted sum; cost:
    of the speed proxy."""

    layers: dict[str, str]
    reached: float
    noise: float
    cost: float


def allocate(
    table: list[Measured], budget: Budget, weights: Mapping[str, float] | None = None, held: int = 0
) -> Allocation:
    """The entries with the least noise, summed over the layers, that meet the budget.

    weights: {layer: factor of its noise}, 1 where there is none; the place for measured gains on the final
    latent. held: bytes that a memory budget pays beside the table's. Memory and cost are met by all that
    fits; an average from 99 % of the budget on. Costs are counted in their common divisor or, where that
    would be more than 2^16 steps, rounded up to steps: the optimum then is that of a budget smaller by at
    most one step a layer. Raises BudgetError with the closest two budgets that can be met.
    """
    problem = _Problem(table, budget, weights or {}, held)
    totals = problem.totals(problem.room)
    total = problem.meeting(totals)
    if total is None:
        closest = " and ".join(budget.text(value) for value in problem.closest())
        raise BudgetError(
            (
                f"no assignment of the {len(problem.menus)} layers meets {budget.text()}. The closest that "
                "can "
                f"be met: {closest}."
            )
            + f" {ONE_X}" * (budget.kind == "speed")
        )
    return problem.allocation(totals.trace(total))


def uniform(
    table: list[Measured],
    entry: str,
    budget: Budget,
    weights: Mapping[str, float] | None = None,
    held: int = 0,
) -> Allocation:
    """Every layer at one entry, in the units of the budget."""
    problem = _Problem(table, budget, weights or {}, held)
    return problem.allocation([list(layer.options).index(entry) for layer in problem.layers])


def pareto(
    table: list[Measured], budget: Budget, weights: Mapping[str, float] | None = None, held: int = 0
) -> list[tuple[float, float]]:
    """[(budget, least noise)] of all budgets of this kind, from one dynamic program; only points that no
    cheaper one equals."""
    problem = _Problem(table, budget, weights or {}, held)
    out, least = [], math.inf
    for total, noise in enumerate(problem.totals(problem.span).noise.tolist()):
        if noise < least:
            least = noise
            out.append((problem.value(problem.base + total * problem.step), noise))
    return out


class _Problem:
    """The layers with a choice, their whole-number costs above the least, and the unit of the budget."""

    def __init__(self, table, budget, weights, held):
        self.budget = budget
        self.layers = [s for s in table if not s.fixed]
        if not self.layers:
            raise BudgetError("no layer has quantized activations: there is nothing to allocate")
        self.gain = [weights.get(s.name, 1.0) for s in self.layers]
        scale = lambda s: s.weights if budget.average else 1
        self.costs = [[round(budget.of(c) * scale(s)) for c in s.options.values()] for s in self.layers]
        self.held = (
            held + sum(c.nbytes for s in table if s.fixed for c in s.options.values())
            if budget.kind == "memory"
            else 0
        )
        unit = {"memory": lambda s: 0, "speed": reference_cost}.get(budget.kind, lambda s: s.weights)
        self.whole = sum(map(unit, self.layers)) or 1
        least = [min(costs) for costs in self.costs]
        self.base = sum(least)
        above = [[c - low for c in costs] for costs, low in zip(self.costs, least, strict=True)]
        common = max(1, reduce(math.gcd, (c for costs in above for c in costs)))
        most = sum(max(costs) for costs in above)
        self.step = common * max(1, math.ceil(most / common / STEPS))
        self.menus = [
            [
                (-(-c // self.step), gain * option.noise)
                for c, option in zip(costs, s.options.values(), strict=True)
            ]
            for costs, s, gain in zip(above, self.layers, self.gain, strict=True)
        ]
        self.span = sum(max(c for c, _ in menu) for menu in self.menus)
        # A millionth of slack: 0.1 + 0.2 bits must not miss 0.3.
        self.room = min(self.span, self._steps(budget.value * (1 + 1e-6)))

    def totals(self, room) -> Totals:
        return Totals.of(self.menus, max(room, 0))

    def value(self, cost) -> float:
        """A cost in the unit of the budget."""
        return cost / self.whole + self.held

    def meeting(self, totals) -> int | None:
        """The best total that meets the budget."""
        if self.room < 0:
            return None
        low = 0 if not self.budget.average else max(0, self._steps(NEAR * self.budget.value * (1 - 1e-6)) + 1)
        return totals.best(low, self.room)

    def allocation(self, picks) -> Allocation:
        options = [list(s.options.items())[pick] for s, pick in zip(self.layers, picks, strict=True)]
        noise = sum(gain * option.noise for gain, (_, option) in zip(self.gain, options, strict=True))
        reached = self.value(sum(costs[pick] for costs, pick in zip(self.costs, picks, strict=True)))
        layers = {s.name: name for s, (name, _) in zip(self.layers, options, strict=True)}
        return Allocation(layers, reached, noise, sum(option.cost for _, option in options))

    def closest(self) -> list[float]:
        """The nearest budget below and above that can be met; the nearest two on one side where the other has
        none."""
        totals = self.totals(self.span)
        reachable = totals.noise.isfinite().nonzero().flatten().tolist()
        below = [t for t in reachable if t <= self.room][-2:]
        above = [t for t in reachable if t > self.room][:2]
        pair = (below[-1:] + above[:1]) if below and above else (below or above)
        return [self.allocation(totals.trace(t)).reached for t in pair]

    def _steps(self, value) -> int:
        """Whole steps above the least cost that a budget pays for; below 0 where it does not pay for that."""
        return math.floor(((value - self.held) * self.whole - self.base) / self.step)


@dataclass(frozen=True)
class Allocated:
    """What was chosen and why. held: bytes of what is not quantized; uniforms: {entry: every layer at it};
    curve: of `pareto`."""

    budget: Budget
    table: list[Measured]
    allocation: Allocation
    uniforms: dict[str, Allocation]
    curve: list[tuple[float, float]]
    held: int


def measure_and_decide(
    source: Source,
    plan: list[Layer],
    calibration: Calibration,
    budget: Budget,
    config: MixedConfig,
    gains: Mapping[str, float] | None,
    path: Path,
    settings: dict,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
    size: Callable[[torch.Tensor], int] = lambda tensor: tensor.nbytes,
    workers: Workers = HERE,
) -> Allocated:
    """`sensitivity` of the layers of `plan`, kept in `path` under `settings`, and what `decide` makes of it.

    gains: {layer: factor}, None for 1. size: bytes that a tensor which is not quantized will take. workers:
    who measures. Raises what the two raise.
    """
    table = sensitivity(plan, source, calibration, config, path, settings, device, progress, workers)
    held = sum(size(source.get(key)) for key in rest_of(source, (row.name for row in table)))
    return decide(table, budget, config, gains, held)


def decide(
    table: list[Measured],
    budget: Budget,
    config: MixedConfig,
    weights: Mapping[str, float] | None,
    held: int,
) -> Allocated:
    """The allocation, and what it is compared with. held: bytes beside the table. Raises BudgetError,
    ValueError for gains of other layers."""
    if unknown := set(weights or {}) - {s.name for s in table}:
        raise ValueError(
            f"gains are given for layers that the model does not have: {', '.join(sorted(unknown)[:3])}"
        )
    chosen = allocate(table, budget, weights, held)
    uniforms = {e.name: uniform(table, e.name, budget, weights, held) for e in config.menu}
    return Allocated(budget, table, chosen, uniforms, pareto(table, budget, weights, held), held)


def with_choice(layers: Iterable[Layer]) -> list[Layer]:
    """Those that a menu is for, and whose gains count."""
    return [layer for layer in layers if not layer.weight_only and not not_quantizable(layer)]
