"""Gradients through blocks that add to their streams in place, as ComfyUI's do."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch.autograd.graph import allow_mutation_on_saved_tensors


class _Kept(WeakKeyDictionary):
    """Keeps what is deleted from it alive."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __delitem__(self, handle):
        self.kept.append(self[handle])
        super().__delitem__(handle)


@contextmanager
def mutation_allowed() -> Iterator[None]:
    """PyTorch's `allow_mutation_on_saved_tensors`, with gradients that are right wherever tensors lie.

    PyTorch knows a saved tensor by its id, its address and its version, and lets go of one that is changed in
    place. A later tensor that takes its place is then taken for it, and gets the gradient of the other's
    values: by chance, so that two runs of one training differed. Here such tensors live until the context
    ends.
    """
    with allow_mutation_on_saved_tensors() as context:
        context.original = _Kept()
        yield
