"""Passes behind the first that run a network's blocks again in place of sampling again, and what each way
costs."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ..families import Family, Layer
from .plan import Input


@dataclass(frozen=True)
class Chained:
    """A network whose blocks are each fed by the one before alone.

    blocks: {block of the plan: name of its module in the network}, in the order of the forward pass.
    within(sample, work): calls work() once, while the network is loaded and patched as in that sample's
    sampling run.
    """

    network: torch.nn.Module
    blocks: dict[str, str]
    within: Callable[[int, Callable[[], None]], None] = field(default=lambda sample, work: work())


def is_chain(family: Family, layers: list[Layer]) -> bool:
    """Whether every block of the layers is known to be fed by the one before alone."""
    return family.chain and all(re.fullmatch(family.block, layer.block) for layer in layers)


@dataclass(frozen=True)
class Span:
    """The blocks first .. stop - 1 that hold the inputs of a pass."""

    first: int
    stop: int


def spans_of(
    passes: list[list[Input]], modules: dict[str, torch.nn.Module], chained: Chained
) -> list[Span] | None:
    """The blocks of each pass; None where the passes behind the first cannot be replayed: an input lies
    outside of its block, or the blocks' order is not that of the plan."""
    place = {name: i for i, name in enumerate(chained.blocks)}
    inside = {
        block: set(chained.network.get_submodule(name).modules()) for block, name in chained.blocks.items()
    }
    spans: list[Span] = []
    for number, group in enumerate(passes):
        if any(i.block not in place for i in group):
            return None
        if number and any(modules[i.name] not in inside[i.block] for i in group):
            return None
        at = [place[i.block] for i in group]
        spans.append(Span(min(at), max(at) + 1))
        if number and spans[-1].first < spans[-2].stop - 1:
            return None
    return spans


def worth(spans: list[Span], blocks: int) -> float:
    """Samplings' worth of block evaluations: the first pass samples, each further one runs its own blocks.
    blocks: of the network."""
    again = [max(span.stop, later.first) - span.first for span, later in pairwise(spans[1:])]
    return 1 + (sum(again) + sum(span.stop - span.first for span in spans[1:][-1:])) / blocks


def cost_text(passes: int, spans: list[Span] | None, blocks: int) -> str:
    """One line on the work ahead. passes: those that are not done yet; spans: theirs, None where each
    samples."""
    if spans is None or passes < 2:
        return f"{passes} passes over the samples, {passes} samplings' worth of work"
    return (
        f"{passes} passes, one that samples and {passes - 1} that run blocks again: "
        f"{worth(spans, blocks):.2f} samplings' worth of work in place of {passes}"
    )
