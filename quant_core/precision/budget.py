"""Which units to raise to a higher precision under a budget, on numbers alone. A unit is a layer, or the
layers of a block together.

Noise is the noise-to-signal ratio of a layer's output, 10^(-SQNR/10); of a block, the sum over its layers.
"""

import math
from dataclasses import dataclass

import torch


class BudgetError(ValueError):
    """A budget that means nothing, or that nothing meets."""


@dataclass(frozen=True)
class Upgrade:
    """A unit at a higher precision. extra: bytes over what it has now, below 0 where it gets smaller; noise:
    the unit's then."""

    precision: str
    extra: int
    noise: float


@dataclass(frozen=True)
class Unit:
    """What may be raised, as it is now, and to what. layers: the number of layers that `noise` is the sum
    over."""

    name: str
    noise: float
    upgrades: tuple[Upgrade, ...] = ()
    layers: int = 1

    @property
    def improving(self) -> list[Upgrade]:
        """The upgrades that measure better than what is there; no other is ever taken."""
        return [o for o in self.upgrades if o.noise < self.noise]


def decibel(noise: float) -> float:
    """SQNR in dB of a noise-to-signal ratio; inf where there is no noise."""
    return math.inf if noise <= 0 else -10 * math.log10(noise)


def for_quality(units, target: float) -> dict[str, Upgrade]:
    """The cheapest upgrade at which each unit's mean noise has an SQNR of at least `target` dB; {} of those
    that have it now.

    A unit that no upgrade brings there gets the one that comes nearest. Raises BudgetError where target is
    not a number above 0.
    """
    if not 0 < target < math.inf:
        raise BudgetError(
            f"the target must be an SQNR above 0 dB, found {target:g}; 20 to 30 dB are usual for 4-bit layers"
        )
    limit, chosen = 10 ** (-target / 10), {}
    for unit in units:
        if unit.noise / unit.layers <= limit or not unit.improving:
            continue
        enough = [o for o in unit.improving if o.noise / unit.layers <= limit]
        if enough:
            chosen[unit.name] = min(enough, key=lambda o: (o.extra, o.noise))
        else:
            chosen[unit.name] = min(unit.improving, key=lambda o: (o.noise, o.extra))
    return chosen


def for_memory(units, budget: int, steps: int = 2**16) -> dict[str, Upgrade]:
    """The upgrades that leave the least noise, summed over all units, at `budget` bytes more in all or less.

    Dynamic programming over the bytes that may be spent, cut into `steps`: the optimum of a budget smaller by
    at most one step a unit, 0.35 % of it for the 228 layers of FLUX.1, and the optimum itself where a step is
    one byte. Upgrades without extra bytes need no budget, and bytes that one saves may be spent
    elsewhere. Raises BudgetError for a budget below 0.
    """
    if not 0 <= budget < math.inf:
        raise BudgetError(f"the memory budget must be 0 or more, found {budget:g} bytes")
    units = [u for u in units if u.improving]
    best = {u.name: min(u.improving, key=lambda o: (o.noise, o.extra)) for u in units}
    if sum(o.extra for o in best.values()) <= budget:
        return best
    # The first of equal noise wins, so a unit stays as it is where nothing is gained.
    menus = [[Upgrade("", 0, u.noise), *sorted(u.improving, key=lambda o: o.extra)] for u in units]
    least = [min(o.extra for o in menu) for menu in menus]
    spare = budget - sum(least)  # never below 0: to stay costs nothing
    step = max(1, math.ceil(spare / steps))
    costs = [
        [(-(-(o.extra - low) // step), o.noise) for o in menu] for menu, low in zip(menus, least, strict=True)
    ]
    totals = Totals.of(costs, spare // step)
    last = totals.best(0, spare // step)
    assert last is not None  # to stay costs nothing
    picks = totals.trace(last)
    return {u.name: menu[pick] for u, menu, pick in zip(units, menus, picks, strict=True) if pick}


@dataclass(frozen=True)
class Totals:
    """The least noise at each total cost: exact dynamic programming over menus of (cost, noise), one item of
    each to be taken.

    noise: (room + 1,) fp64, inf at totals that cannot be had. costs: of the items. picks: the item of each
    menu at each total.
    """

    noise: torch.Tensor
    costs: list[list[int]]
    picks: list[torch.Tensor]

    @classmethod
    def of(cls, menus: list[list[tuple[int, float]]], room: int) -> "Totals":
        """For totals 0..room; costs are whole numbers, 0 or more. Of equal noise the item that stands first
        in its menu is kept."""
        noise, picks = torch.full((room + 1,), torch.inf, dtype=torch.float64), []
        noise[0] = 0.0
        for menu in menus:
            after, pick = torch.full_like(noise, torch.inf), torch.zeros(room + 1, dtype=torch.int8)
            for i, (cost, added) in enumerate(menu):
                if cost <= room:
                    less = (there := noise[: room + 1 - cost] + added) < after[cost:]
                    after[cost:][less], pick[cost:][less] = there[less], i
            noise = after
            picks.append(pick)
        return cls(noise, [[cost for cost, _ in menu] for menu in menus], picks)

    def best(self, low: int, high: int) -> int | None:
        """The lowest total within low..high among those of least noise; None where none can be had."""
        window = self.noise[low : high + 1]
        if not len(window) or not torch.isfinite(least := window.min()):
            return None
        return low + int((window == least).nonzero()[0])

    def trace(self, total: int) -> list[int]:
        """The item of each menu that a total is made of."""
        out = []
        for costs, picks in zip(reversed(self.costs), reversed(self.picks), strict=True):
            out.append(int(picks[total]))
            total -= costs[out[-1]]
        return out[::-1]
