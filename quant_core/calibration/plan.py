"""Which inputs are observed in which pass, so that second-moment matrices never outgrow the memory they are
given."""

from dataclasses import dataclass

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


def plan_passes(inputs, memory: int, reservoir: int = 1024) -> list[list[Input]]:
    """Groups inputs into passes over the samples, each within `memory` bytes where a single input allows it."""
    passes: list[list[Input]] = [[]]
    used = 0
    for item in inputs:
        size = InputStatistics.nbytes(item.width, item.blocks, reservoir)
        if passes[-1] and used + size > memory:
            passes.append([])
            used = 0
        passes[-1].append(item)
        used += size
    return passes
