"""LoRAs that ComfyUI's bypass loaders have put into a model: injections that make a layer's `forward` add an
adapter's output.

What they add is a difference of the weight all the same, and is read here as the patch that a LoRA loader
would have made of it.
"""

import inspect

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import BypassInjectionManager
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter

from .adapters import Patch
from .inherited import NotInheritable

# What a bypass leaves out of an adapter's weights: DoRA's magnitudes, which ask for the layer's weight, and
# the new shape of the layer.
LEFT_OUT = {LoRAAdapter: (4, 5), LoHaAdapter: (7,), LoKrAdapter: (8,)}
# Dtypes of a layer in which its adapter is held once it was injected.
INJECTED = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
)


def patches_of(patcher: ModelPatcher, names: dict) -> dict[str, list]:
    """{layer: [ModelPatcher's tuples]} of what the injections on a MODEL add to its layers. names: {module:
    its name}, of the network.

    Raises NotInheritable for injections of another kind, and for adapters that act on a layer's output, bias
    and all, as OFT does.
    """
    found, unreadable = {}, []
    for key, injections in patcher.injections.items():
        for injection in injections:
            if (manager := _manager(injection.inject)) is None:
                raise NotInheritable("injections", [key])
            for hook in manager.hooks:
                name, patch = names.get(hook.module), _patch(hook)
                if name is None or patch is None:
                    unreadable.append(name or "layers of another model")
                else:
                    found.setdefault(name, []).append(patch)
    if unreadable:
        raise NotInheritable(
            "bypass adapters that are no LoRA, LoHa or LoKr",
            unreadable,
            " Or load them with LoraLoaderModelOnly.",
        )
    return found


def _manager(inject) -> BypassInjectionManager | None:
    """Nothing but the function that injects refers to it."""
    held = inspect.getclosurevars(inject).nonlocals.values() if inspect.isfunction(inject) else ()
    return next((value for value in held if isinstance(value, BypassInjectionManager)), None)


def _patch(hook):
    if (left_out := LEFT_OUT.get(type(hook.adapter))) is None:
        return None
    weights = tuple(None if i in left_out else w for i, w in enumerate(hook.adapter.weights))
    return hook.multiplier, type(hook.adapter)(hook.adapter.loaded_keys, weights), 1.0, None, None


def as_injected(patch: Patch, dtype: torch.dtype) -> Patch:
    """The same patch in the dtype that the first sampling run leaves it in, by which a model is recognized
    before and after it."""
    strength, adapter, *rest = patch
    if dtype not in INJECTED:
        return patch
    weights = tuple(w.to(dtype) if isinstance(w, torch.Tensor) else w for w in adapter.weights)
    return (strength, type(adapter)(adapter.loaded_keys, weights), *rest)
