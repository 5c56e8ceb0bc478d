"""ComfyUI operations whose Linear, and 1x1 Conv1d and Conv2d, hold a quantized layer where there is one."""

from collections.abc import Callable

import comfy.ops
import torch

from ...quant_core.layer.linear import QuantizedLayer
from .packed import Layers, Packable


def operations_for(
    take: Callable[[str], QuantizedLayer | None], prepare: Callable[[QuantizedLayer], QuantizedLayer]
) -> type:
    """An operations class for `custom_operations`, whose modules get what `Layers` describes."""
    source = Layers(take, prepare)

    class NibbleOperations(comfy.ops.manual_cast):
        class Linear(PackableLinear, comfy.ops.manual_cast.Linear):
            layers = source

        class Conv1d(PackableConvolution, comfy.ops.manual_cast.Conv1d):
            layers, spatial = source, 1

        class Conv2d(PackableConvolution, comfy.ops.manual_cast.Conv2d):
            layers, spatial = source, 2

    return NibbleOperations


class PackableLinear(Packable):
    """A linear layer without tensors until it loads."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self._begin(in_features, out_features, bias, dtype)


class PackableConvolution(Packable):
    """A convolution that may be a linear layer over the channels, and has no tensors then until it loads."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *args: object,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> None:
        one = kernel_size in (1, (1,), (1, 1))
        made_on = "meta" if one else device
        super().__init__(in_channels, out_channels, kernel_size, *args, device=made_on, dtype=dtype, **kwargs)
        self.pointwise = one and is_pointwise(self)
        if self.pointwise:
            self._begin(in_channels, out_channels, self.bias is not None, dtype)
        elif one:
            self.to_empty(device=torch.get_default_device() if device is None else device)


def replaceable(module: torch.nn.Module) -> bool:
    """Whether a module of a network is one that ours can stand for: ComfyUI's linear layer, or its
    convolution where that is one."""
    if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)):
        return isinstance(module, comfy.ops.CastWeightBiasOp) and is_pointwise(module)
    # Embeddings cast their weights as linear layers do, and their shapes tell nothing.
    return isinstance(module, torch.nn.Linear) or (
        isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
    )


def is_pointwise(convolution: torch.nn.Conv1d | torch.nn.Conv2d) -> bool:
    """Whether a convolution is a linear layer over the channels."""
    sizes = (*convolution.kernel_size, *convolution.stride, convolution.groups)
    return all(n == 1 for n in sizes) and (
        isinstance(convolution.padding, str) or not any(convolution.padding)
    )
