"""Runs of consecutive blocks of a network, by the network's own forward: blocks before a run are stubs, the
forward is left after it.

What stands between blocks (embeddings, modulation, FLUX's joining of its streams) is the model's own code,
whatever the host; nothing of it is written down here.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch

State = tuple[torch.Tensor, ...]  # and None where a block of two streams ends one of them


class Form:
    """What a block returned: a tensor or a tuple of them, in which None may stand, and how each lies where.

    Raises TypeError for anything else.
    """

    def __init__(self, out):
        self.single = isinstance(out, torch.Tensor)
        self.state: tuple = (out,) if self.single else tuple(out)
        if not all(t is None or isinstance(t, torch.Tensor) for t in self.state):
            raise TypeError(f"returns {[type(t).__name__ for t in self.state]}")
        self.tensors = [None if t is None else (t.shape, t.dtype, t.device) for t in self.state]

    def without_state(self) -> "Form":
        """Holds no tensor alive."""
        self.state = ()
        return self

    def made_of(self, state: tuple):
        """The same of a state that may lie elsewhere; copies: blocks may add to their input in place."""
        return self._one(
            None if m is None or t is None else t.to(m[2], copy=True)
            for t, m in zip(state, self.tensors, strict=True)
        )

    def zeros(self):
        """Stands for outputs that nothing is computed from. Real memory: networks add to them in place, such
        as the residuals of a ControlNet."""
        return self._one(
            None if m is None else torch.zeros(m[0], dtype=m[1], device=m[2]) for m in self.tensors
        )

    def _one(self, tensors):
        out = tuple(tensors)
        return out[0] if self.single else out


class _Left(Exception):
    """Carries a run's output out of the network's forward."""


class Chain:
    """blocks: names of the network's blocks in the order of the forward pass, each called once and fed by the
    one before.

    call(index): runs the network on the index-th recorded call and returns its prediction.
    """

    def __init__(self, network: torch.nn.Module, blocks: list[str], call: Callable[[int], torch.Tensor]):
        self.modules, self.names, self.call = [network.get_submodule(b) for b in blocks], list(blocks), call
        self.forms: dict[int, list] = {}  # of each call, what its blocks returned

    def __len__(self) -> int:
        return len(self.modules)

    def run(self, index: int, first: int, stop: int, state: State | None) -> State:
        """The outputs of block `stop` - 1 on a recorded call, from the outputs `state` of block `first` - 1;
        None from the start.

        stop = len(self) + 1 runs to the prediction of the network. The first run of a call must be from the
        start.
        """
        forms = self.forms.setdefault(index, [None] * len(self.modules))
        with replaced(self._stubs(first, state, forms)), self._exit(stop, forms):
            try:
                return (self.call(index),)
            except _Left as left:
                return left.args[0]

    @staticmethod
    def _stub(form, state):
        return lambda *args, **kwargs: form.zeros() if state is None else form.made_of(state)

    def _stubs(self, first, state, forms):
        return {
            module: self._stub(forms[i], state if i == first - 1 else None)
            for i, module in enumerate(self.modules[:first])
        }

    @contextmanager
    def _exit(self, stop, forms):
        def hook(i):
            def after(module, args, out):
                form = Form(out)
                state = form.state
                forms[i] = form.without_state()
                if i == stop - 1:
                    raise _Left(state)

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
