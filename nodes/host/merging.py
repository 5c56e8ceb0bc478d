"""Whether ComfyUI can merge a patch into a weight of full precision. It would log what it cannot, and go on
without it."""

import torch
from comfy.weight_adapter import WeightAdapterBase

from .adapters import Patch, misfit, only_scales, times, unusable, wanted


def unmergeable(patch: Patch, shape: tuple[int, ...]) -> str:
    """Why a patch, ModelPatcher's tuple, does not go into a tensor of this shape; "" where it does, or no
    more than scales it."""
    value, offset = patch[1], patch[3]
    if only_scales(patch):
        return ""
    if offset is not None and (offset[0] >= len(shape) or sum(offset[1:]) > shape[offset[0]]):
        return (
            f"a patch of positions {offset[1]} to {sum(offset[1:])} along dimension {offset[0]} of "
            f"{times(shape)} weights"
        )
    if isinstance(value, list):  # its weight, and what makes real values of it
        return _of_another_model(value[0][0], wanted(patch, shape), "a merge with another model")
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "model_as_lora":
        return _of_another_model(value[1][0], wanted(patch, shape), "the difference to another model")
    if isinstance(value, tuple) and len(value) != 1 and value[0] not in ("diff", "set"):
        return f"a patch of the unknown kind {value[0]!r}"
    if not isinstance(value, (tuple, WeightAdapterBase)):
        return f"a patch of the unknown kind {type(value).__name__}"
    return unusable(patch, shape) or misfit(patch, shape)


def _of_another_model(tensor, shape, what):
    """Of packed weights, as wide in memory as they are narrow, ComfyUI or we make values of the layer's
    shape."""
    if (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and tuple(tensor.shape) != shape
    ):
        return f"{what}, whose weight is {times(tensor.shape)}, on {times(shape)} weights"
    return ""
