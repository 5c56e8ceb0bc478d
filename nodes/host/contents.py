"""A MODEL taken apart, quantized by Nibble or not: what two models are put together from."""

from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_core.formats.scaled import computable
from ...quant_core.layer.linear import QuantizedLayer
from .bare import PREFIX, bare, original
from .build import ATTACHMENT, unpatched
from .inherited import require_inheritable
from .patcher import NibblePatcher
from .reduced import Reduced, plain
from .source import QuantizedSource


@dataclass(frozen=True)
class Contents:
    """A model before any patch. layers: {name: QuantizedLayer}. rest: {key: tensor}. info: Nibble's
    attachment, {} for a stock model."""

    patcher: object
    layers: dict[str, QuantizedLayer]
    rest: dict[str, torch.Tensor]
    info: dict

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As if nothing were quantized."""
        shapes = {key: tuple(t.shape) for key, t in self.rest.items()}
        for name, layer in self.layers.items():
            shapes[f"{name}.weight"] = layer.spec.logical_shape
            if layer.spec.bias:
                shapes[f"{name}.bias"] = (layer.spec.out_features,)
        return shapes

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values()) + sum(t.nbytes for t in self.rest.values())


def take_apart(patcher: ModelPatcher) -> Contents:
    """The tensors are the model's own where it is on the CPU; a model on a card is unloaded first, or each
    would be copied from there.

    The weights of a dynamic patcher are ComfyUI's to page in and out; they are read again into a model of
    their own. Raises NotInheritable for what `inherit_sampling_patches` would leave behind.
    """
    require_inheritable(patcher)
    if patcher.is_dynamic():
        patcher = patcher.clone(disable_dynamic=True)
    if not comfy.model_management.is_device_cpu(patcher.current_loaded_device()):
        comfy.model_management.unload_model_and_clones(
            patcher, unload_additional_models=False, all_devices=True
        )
    if isinstance(patcher, NibblePatcher):
        return Contents(patcher, *unpatched(patcher), patcher.attachments[ATTACHMENT])
    return Contents(patcher, {}, dict(_stock(patcher)), {})


def _stock(patcher):
    """(key, tensor) of a stock model. 8-bit floats become bf16, what ComfyUI and ComfyUI-GGUF hold below 16
    bit its real values in bf16, which are copies."""
    with bare(patcher) as model:
        modules = dict(model.diffusion_model.named_modules())
        state = model.diffusion_model.state_dict()
    reduced = Reduced(modules)
    for key, tensor in state.items():
        name, _, leaf = key.rpartition(".")
        if reduced.is_beside(key):
            continue
        module = modules[name]
        if key in reduced.shapes:
            yield key, reduced.real(key, original(patcher, PREFIX + key, getattr(module, leaf))).cpu()
            continue
        if getattr(module, "quant_format", None) is not None:  # quantized by ComfyUI
            if leaf == "pre_quant_scale":
                raise QuantizedSource(
                    f"{key}: weights of a model that smooths its activations cannot be read. Connect another "
                    "model."
                )
            if leaf not in ("weight", "bias"):
                continue
            tensor = getattr(module, leaf)
        elif name in reduced.layers:
            tensor = getattr(module, leaf)
        tensor = plain(original(patcher, PREFIX + key, tensor)).detach()
        if leaf == "weight" and hasattr(module, "convert_weight"):
            tensor = module.convert_weight(tensor)
        if tensor.dtype in (torch.int8, torch.uint8):
            raise QuantizedSource(
                f"{key}: packed weights of another kind than Nibble's ({tensor.dtype}). Connect a "
                "full-precision model."
            )
        yield key, computable(tensor).cpu()
