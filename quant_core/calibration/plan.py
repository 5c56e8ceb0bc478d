"""Which inputs are observed in which pass, so that second-moment matrices never outgrow the memory they are
given."""

from dataclasses import dataclass
from itertools import groupby

from ..layer.statistics import InputStatistics, hessian_blocks

# Widest second-moment matrix; wider inputs get several on the diagonal. Full matrices for the 12288
# in-channels of FLUX's MLPs would make 53 GB of statistics for the whole model; blocks of 3072 make 22 GB, 3
# GB of them tokens.
HESSIAN_WIDTH = 3072


@dataclass(frozen=True)
class Input:
    """One thing to observe: the input of layer `name`."""

    name: str
    width: int
    blocks: tuple[tuple[int, int], ...]
    block: str

    def statistics(self, reservoir=1024) -> InputStatistics:
        return InputStatistics.empty(self.name, self.width, self.blocks, reservoir)


def inputs_of(layers, hessian_width: int = HESSIAN_WIDTH) -> list[Input]:
    """The distinct inputs of the layers, in order. hessian_width 0: no second moments."""
    out = {}
    for layer in layers:
        if layer.input not in out:
            blocks = (
                hessian_blocks([(p.start, p.stop) for p in layer.parts], hessian_width)
                if hessian_width
                else ()
            )
            out[layer.input] = Input(layer.input, layer.in_features, blocks, layer.block)
    return list(out.values())


def statistics_bytes(inputs: list[Input], reservoir: int = 1024) -> int:
    """Bytes of the statistics of inputs at the most, in memory and in a file."""
    return sum(InputStatistics.nbytes(i.width, i.blocks, reservoir) for i in inputs)


def plan_passes(inputs, memory: int, reservoir: int = 1024, whole_blocks: bool = False) -> list[list[Input]]:
    """Groups inputs into passes over the samples, each within `memory` bytes where a single input allows it.

    whole_blocks: the inputs of a block that all fit into the memory stay together, so that a replay runs it
    once.
    """
    size = lambda group: statistics_bytes(group, reservoir)
    units = [[item] for item in inputs]
    if whole_blocks:
        blocks = [list(group) for _, group in groupby(inputs, key=lambda item: item.block)]
        units = [u for b in blocks for u in ([b] if size(b) <= memory else [[item] for item in b])]
    passes: list[list[Input]] = [[]]
    for unit in units:
        if passes[-1] and size(passes[-1]) + size(unit) > memory:
            passes.append([])
        passes[-1] += unit
    return passes
