"""One evaluation of a network, watched: which layers it calls, in which order, on how many rows, and which on
the same tensor."""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ...kernels.operator.spec import GELU_SHIFT
from ...kernels.operator.transforms import channels_last
from ..families.layer import SHARED, Layer, by_block

VALUES = 64
FEW_ROWS = 8  # rows a call up to which x is one vector a picture (both halves of a batch of 4)


@dataclass
class Observation:
    """order: names of the layers as they are first called. shared: {layer: the first layer that read the same
    tensor}, itself left out. rows: {layer: most rows of one call}. `to_json` goes into a calibration's
    header."""

    order: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict:
        return {"order": self.order, "shared": self.shared, "rows": self.rows}

    @contextmanager
    def watching(self, modules: dict[str, torch.nn.Module]):
        """modules: {layer: module}. A tensor counts as the same while the object lives and its values are
        unchanged: a network may add in place between two uses. No activation is kept alive."""
        live: dict[int, tuple[weakref.ref, str, torch.Tensor]] = {}
        handles = [
            module.register_forward_pre_hook(self._hook(name, live)) for name, module in modules.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name, live):
        def hook(module, args):
            x = tensor_of(args[0])
            # A call without tokens says nothing: two layers that read one empty tensor may not share the
            # next.
            if not x.numel():
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
    return channels_last(
        tensor_of(x), len(module.kernel_size) if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)) else 0
    )


def _some(x) -> torch.Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // VALUES)].clone()


def measured(layers: list[Layer], calibration) -> list[Layer]:
    """`layers` as the calibration observed them, in the order of the forward pass, without those that
    `why_left_out` has a reason for."""
    kept = [layer for layer in layers if not why_left_out(layer, calibration)]
    seen = None if calibration is None else calibration.meta.get("observed")
    return (
        [after_gelu(layer, calibration) if layer.rule else layer for layer in observed(kept, seen)]
        if seen
        else kept
    )


def why_left_out(layer: Layer, calibration) -> str:
    """Why a layer that the rules found stays in 16 bit, "" where it is quantized.

    Modulation that all blocks share wants a calibration: rounded to nearest it took a fourth of a small
    FLUX.2's accuracy (the latents' error 0.37 instead of 0.29), with a calibration a twentieth.
    """
    if not layer.rule:
        return ""
    if calibration is None:
        return (
            "modulation that all blocks share: quantized with a calibration only"
            if layer.rule == SHARED
            else ""
        )
    if seen := calibration.meta.get("observed"):
        return _unlike(layer, seen)
    return "" if layer.input in calibration.names else "the calibration holds no statistics of it"


def _unlike(layer, seen) -> str:
    """What an Observation has against the guess of the rules."""
    if layer.name not in seen["rows"]:
        return "never called during the calibration"
    # Sensitive, and W4A16 is slow for many rows.
    if layer.weight_only and seen["rows"][layer.name] > FEW_ROWS:
        return f"modulation of single tokens, {seen['rows'][layer.name]} rows a call"
    return ""


def observed(layers: list[Layer], seen: dict) -> list[Layer]:
    """Layers of a map as they are; the others as an Observation's JSON has them: order of blocks and layers,
    shared inputs, weight-only; without those never called, and without layers of many rows that modulate."""
    by_map = [layer for layer in layers if not layer.rule]
    by_rule = [
        replace(
            layer,
            weight_only=seen["rows"][layer.name] <= FEW_ROWS,
            input=seen["shared"].get(layer.name, layer.name),
        )
        for layer in layers
        if layer.rule and not _unlike(layer, seen)
    ]
    place = {name: i for i, name in enumerate(seen["order"])}
    return by_block(by_map + sorted(by_rule, key=lambda layer: place[layer.name]))


def after_gelu(layer: Layer, calibration) -> Layer:
    """The layer with its input marked as a GELU's output where no held-out token is below -GELU_SHIFT and
    some go beyond 1."""
    if layer.weight_only or layer.input not in calibration.names:
        return layer
    tokens = calibration.get(layer.input, second_moments=False).tokens
    if tokens.numel() and tokens.min() >= -GELU_SHIFT and tokens.max() > 1:
        return replace(layer, parts=tuple(replace(part, after_gelu=True) for part in layer.parts))
    return layer
