"""One evaluation of a network, watched: which layers it calls, in which order, on how many rows, and which on the same tensor."""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..transforms import channels_last

VALUES = 64


@dataclass
class Observation:
    """order: names of the layers as they are first called. shared: {layer: the first layer that read the same tensor}, itself left out.
    rows: {layer: most rows of one call}. `to_json` goes into a calibration's header."""

    order: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict:
        return {"order": self.order, "shared": self.shared, "rows": self.rows}

    @contextmanager
    def watching(self, modules: dict[str, torch.nn.Module]):
        """modules: {layer: module}. A tensor counts as the same while the object lives and its values are unchanged: a network may add
        in place between two uses. No activation is kept alive."""
        live = {}
        handles = [module.register_forward_pre_hook(self._hook(name, live)) for name, module in modules.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name, live):
        def hook(module, args):
            x = tensor_of(args[0])
            if not x.numel():  # a call without tokens says nothing: two layers that read one empty tensor may not share the next
                return
            self.rows[name] = max(self.rows.get(name, 0), x.numel() // rows_of(module, x).shape[-1])
            if name in self.order:
                return
            self.order.append(name)
            some = _some(x)
            first = live.get(id(x))
            if first is not None and first[0]() is x and torch.equal(first[2], some):
                self.shared[name] = first[1]
            else:
                live[id(x)] = (weakref.ref(x), name, some)

        return hook


def tensor_of(x) -> torch.Tensor:
    """The tensor that a layer reads: ComfyUI's sparse tensors (TRELLIS.2) hold theirs as `feats`."""
    return x if isinstance(x, torch.Tensor) else x.feats


def rows_of(module: torch.nn.Module, x) -> torch.Tensor:
    """What a layer reads, channels last: those of a convolution stand in front of its spatial dimensions."""
    return channels_last(tensor_of(x), len(module.kernel_size) if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)) else 0)


def _some(x) -> torch.Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // VALUES)].clone()
