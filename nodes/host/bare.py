"""The one model that all clones of a MODEL share, as it is without what any of them has put on it.

ModelPatcher puts object patches (blocks wrapped by torch.compile, methods of other packs) and patched weights
into the shared model and leaves them there after sampling; what was there before waits in backups, which the
clones share as well.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

NETWORK = "diffusion_model"
PREFIX = f"{NETWORK}."
WRAPPED = "._orig_mod"  # what torch.compile of a module puts into the names of all that it holds


def in_network(name: str) -> bool:
    """Whether the name of an object patch is for the network or something in it."""
    return name == NETWORK or name.startswith(PREFIX)


@contextmanager
def bare(patcher: ModelPatcher) -> Iterator[torch.nn.Module]:
    """Within, `patcher.model` has the modules that it was loaded with, under their own names; gives it.
    Weights may still be patched: `original` knows what they were."""
    model = patcher.model
    with ExitStack() as stack:
        for clone in _injected(patcher):
            stack.enter_context(clone.use_ejected())
        taken = []
        try:
            for name, plain in patcher.object_patches_backup.items():
                taken.append((name, comfy.utils.set_attr(model, name, plain)))
            yield model
        finally:
            for name, put_on in reversed(taken):
                comfy.utils.set_attr(model, name, put_on)


def _injected(patcher) -> list:
    """The clones, loaded ones, whose injections stand in the shared model; some packs' are modules of their
    own."""
    loaded = [held.model for held in comfy.model_management.current_loaded_models]
    return [p for p in loaded if p is not None and p.is_clone(patcher) and p.is_injected]


def original(patcher: ModelPatcher, key: str, held: torch.Tensor) -> torch.Tensor:
    """A tensor of the shared model before any patch of weights, where `held` is what the bare model holds
    under the key of its state dict."""
    backups = (
        (patcher.object_patches_backup, lambda kept: kept),
        (patcher.backup, lambda kept: kept.weight),
        (patcher.hook_backup, lambda kept: kept[0]),
        (getattr(patcher, "backup_buffers", {}), lambda kept: kept),
    )
    for backup, tensor in backups:
        # A weight that was patched while a wrapped block was in place is kept under the name that it had
        # there.
        name = key if key in backup else next((k for k in backup if k.replace(WRAPPED, "") == key), None)
        if name is not None:
            return tensor(backup[name])
    return held
