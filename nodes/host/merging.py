"""Whether ComfyUI can merge a patch into a weight of full precision. It would log what it cannot, and go on without it."""

import torch
from comfy.weight_adapter import WeightAdapterBase
from comfy.weight_adapter.boft import BOFTAdapter
from comfy.weight_adapter.glora import GLoRAAdapter
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from comfy.weight_adapter.oft import OFTAdapter

TITLES = {
    LoRAAdapter: "a LoRA", LoHaAdapter: "a LoHa", LoKrAdapter: "a LoKr", GLoRAAdapter: "a GLoRA", OFTAdapter: "an OFT", BOFTAdapter: "a BOFT",
}  # fmt: skip


def unmergeable(patch, key: str, shape: tuple[int, ...]) -> str:
    """Why a patch, ModelPatcher's tuple, does not go into a weight of this shape; "" where it does, or changes nothing."""
    strength, value, _, offset, _ = patch
    kind = value[0] if isinstance(value, tuple) and len(value) == 2 else "diff"
    if not strength and kind != "set":
        return ""
    if offset is not None:
        axis, first, length = offset
        if axis >= len(shape) or first + length > shape[axis]:
            return f"a patch of positions {first} to {first + length} along dimension {axis} of {by(shape)} weights"
        shape = (*shape[:axis], length, *shape[axis + 1 :])
    if isinstance(value, list):  # of another model: its weight, and what makes real values of it
        return _other(value[0][0], shape, "a merge with")
    if isinstance(value, WeightAdapterBase):
        return "" if _fits(patch, key, shape) else f"{TITLES[type(value)]}{_size(value)} on {by(shape)} weights"
    if not isinstance(value, tuple):
        return f"a patch of the unknown kind {type(value).__name__}"
    tensors = value if len(value) == 1 else value[1]
    if kind == "model_as_lora":
        return _other(tensors[0], shape, "the difference to")
    if kind not in ("diff", "set"):
        return f"a patch of the unknown kind {kind!r}"
    tensor, *settings = tensors
    if not isinstance(tensor, torch.Tensor):
        return f"a {kind} without a tensor"
    if kind == "diff" and settings and settings[0]["pad_weight"]:
        grows = tensor.ndim == len(shape) and all(a >= b for a, b in zip(tensor.shape, shape, strict=True))
        return "" if grows else f"a larger weight of {by(tensor.shape)} for one of {by(shape)}"
    return "" if tuple(tensor.shape) == shape else f"a {kind} of {by(tensor.shape)} on {by(shape)} weights"


def by(shape) -> str:
    return " x ".join(str(int(n)) for n in shape)


def _other(tensor, shape, what):
    """Packed weights are as wide as they are narrow in memory; what ComfyUI or we make of them has the layer's shape."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_floating_point() and tuple(tensor.shape) != shape:
        return f"{what} another model, whose weight is {by(tensor.shape)}, on {by(shape)} weights"
    return ""


def _size(adapter):
    if isinstance(adapter, LoRAAdapter):
        return f" of {by((adapter.weights[0].shape[0], *adapter.weights[1].shape[1:]))}"
    return ""


def _fits(patch, key, shape) -> bool:
    """ComfyUI's own code says so, on the meta device: it hands what it adds through the patch's function, or nothing where it gives up."""
    strength, adapter, strength_model, offset, _ = patch
    if isinstance(adapter, (OFTAdapter, BOFTAdapter)):  # looks at values
        *_, count, width, _ = adapter.weights[0].shape
        return count * width == shape[0]
    if type(adapter) not in TITLES:
        return True
    seen = []
    weights = tuple(w.to("meta") if isinstance(w, torch.Tensor) else w for w in adapter.weights)
    try:
        type(adapter)(adapter.loaded_keys, weights).calculate_weight(
            torch.empty(shape, device="meta"), key, strength, strength_model, offset, lambda added: seen.append(added) or added
        )
    except (RuntimeError, ValueError, IndexError):  # a reshape to something smaller, factors that do not multiply
        return False
    return bool(seen)
