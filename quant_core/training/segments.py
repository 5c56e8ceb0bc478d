"""Runs of consecutive blocks of a network, by the network's own forward: blocks before a run are stubs, the
forward is left after it.

What stands between blocks (embeddings, modulation, FLUX's joining of its streams) is the model's own code,
whatever the host; nothing of it is written down here.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch

State = tuple[torch.Tensor, ...]


class _Left(Exception):
    """Carries a run's output out of the network's forward."""


class Chain:
    """blocks: names of the network's blocks in the order of the forward pass, each called once and fed by the
    one before.

    call(index): runs the network on the index-th recorded call and returns its prediction.
    """

    def __init__(self, network: torch.nn.Module, blocks: list[str], call: Callable[[int], torch.Tensor]):
        self.modules, self.names, self.call = [network.get_submodule(b) for b in blocks], list(blocks), call
        self._shapes: dict[int, list] = {}

    def __len__(self) -> int:
        return len(self.modules)

    def run(self, index: int, first: int, stop: int, state: State | None) -> State:
        """The outputs of block `stop` - 1 on a recorded call, from the outputs `state` of block `first` - 1;
        None from the start.

        stop = len(self) + 1 runs to the prediction of the network. The first run of a call must be from the
        start.
        """
        shapes = self._shapes.setdefault(index, [None] * len(self.modules))
        with self._stubs(first, state, shapes), self._exit(stop, shapes):
            try:
                return (self.call(index),)
            except _Left as left:
                return left.args[0]

    def _stubs(self, first, state, shapes):
        def stub(i):
            single, metas = shapes[i]
            if i == first - 1:  # a copy: blocks may add to their input in place
                out = tuple(t.to(m[2], copy=True) for t, m in zip(state, metas, strict=True))
            else:
                out = tuple(torch.zeros((), dtype=m[1], device=m[2]).expand(m[0]) for m in metas)
            return out[0] if single else out

        return replaced(
            {module: lambda *args, _i=i, **kwargs: stub(_i) for i, module in enumerate(self.modules[:first])}
        )

    @contextmanager
    def _exit(self, stop, shapes):
        def hook(i):
            def after(module, args, out):
                tensors = (out,) if isinstance(out, torch.Tensor) else tuple(out)
                shapes[i] = (isinstance(out, torch.Tensor), [(t.shape, t.dtype, t.device) for t in tensors])
                if i == stop - 1:
                    raise _Left(tensors)

            return after

        handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(self.modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def replaced(modules: dict[torch.nn.Module, Callable]):
    """Each module computes the callable that stands with it."""
    before: dict[torch.nn.Module, Callable | None] = {m: m.__dict__.get("forward") for m in modules}
    for module, forward in modules.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, was in before.items():
            if was is None:
                del module.forward
            else:
                module.forward = was
