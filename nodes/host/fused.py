"""[Linear, GELU(tanh), quantized Linear]: the GELU is left to the activation quantizer of the last, which
reads its input anyway."""

from itertools import pairwise

import torch

from ...kernels.prologue import Gelu
from .packed import is_quantized

GELU = Gelu()


def fuse_gelu(model: torch.nn.Module) -> None:
    """Of every plain Sequential in the model. Its modules stay what they are: code that calls them one by
    one, as ComfyUI's `linear_input_act` and chunked feed-forward nodes do, gets a GELU from the one and none
    from the other.
    """
    for module in model.modules():
        # Wan's feed-forward is a Sequential that computes the GELU itself.
        if type(module).forward is torch.nn.Sequential.forward and any(
            _fits(*pair) for pair in pairwise(module)
        ):
            module.__class__ = type(f"Fused{type(module).__name__}", (Fused, type(module)), {})


def _fits(act, linear) -> bool:
    # One that only inherits reads something else than a tensor, as the linear layer behind it does
    # (TRELLIS.2's sparse ones).
    tanh = getattr(type(act), "forward", None) is torch.nn.GELU.forward and act.approximate == "tanh"
    return tanh and is_quantized(linear) and not linear.spec.weight_only


class Fused(torch.nn.Sequential):
    """A Sequential that hands a GELU to the packed layer behind it, unless something stands in front of that
    layer and must see its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules, prologue = list(self), None
        for i, module in enumerate(modules):
            following = modules[i + 1] if i + 1 < len(modules) else None
            if (
                following is not None
                and _fits(module, following)
                and not (following.wrapped or following._forward_pre_hooks)
            ):
                prologue = GELU
                continue
            x = module(x) if prologue is None else module(x, prologue=prologue)
            prologue = None
        return x
