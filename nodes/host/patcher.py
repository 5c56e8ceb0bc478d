"""A ModelPatcher for packed layers: plain LoRA becomes a side branch, packed bytes never change, all else is refused by name."""

import comfy.model_patcher
import comfy.utils
from comfy.weight_adapter.lora import LoRAAdapter

from .operations import is_quantized


class UnsupportedPatch(RuntimeError):
    """A patch that a quantized layer cannot take."""


def plain_lora(patch) -> str:
    """Why a ModelPatcher patch (strength, value, strength_model, offset, function) is not a plain LoRA; "" if it is."""
    _, value, strength_model, offset, function = patch
    if isinstance(value, list):
        return "a merge with another model"
    if isinstance(value, tuple):
        return f"a {value[0]!r} patch" if isinstance(value[0], str) else "a full-weight patch"
    if not isinstance(value, LoRAAdapter):
        return f"a {getattr(value, 'name', type(value).__name__)} patch"
    up, down, _, mid, dora, reshape = value.weights
    if mid is not None or dora is not None or reshape is not None or up.ndim != 2 or down.ndim != 2:
        return "a LoRA with DoRA, Tucker or reshape parts"
    if strength_model != 1.0:
        return "a merge that scales the weight itself"
    if function is not None or (offset is not None and offset[0] != 0):
        return "a LoRA on a transformed or column-sliced weight"
    return ""


def branch(patch, out_features):
    """A plain LoRA patch as (down (r, K), up (n, r) with the strength in it, first out-channel)."""
    strength, value, _, offset, _ = patch
    up, down, alpha = value.weights[:3]
    scale = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
    first, size = (0, out_features) if offset is None else offset[1:]
    if up.shape[0] != size:
        raise UnsupportedPatch(f"LoRA of {up.shape[0]} out-channels on {size} of a layer")
    return down, up.float() * scale, first


class NibblePatcher(comfy.model_patcher.ModelPatcher):
    """Not the dynamic variant: packed layers cast themselves and are counted with all their tensors."""

    def packed_layers(self):
        """(name, module) of the quantized layers; names as in the state dict, without a leaf."""
        for name, module in self.model.named_modules():
            if is_quantized(module):
                yield name, module

    def _packed(self, key):
        """(module, leaf) where the state dict key belongs to a quantized layer, else None."""
        name, _, leaf = key.rpartition(".")
        try:
            module = comfy.utils.get_attr(self.model, name) if name else None
        except AttributeError:
            return None
        return (module, leaf) if is_quantized(module) else None

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """As ModelPatcher's; raises UnsupportedPatch at once for what a packed layer cannot take."""
        for k, value in patches.items():
            key, offset, function = (k, None, None) if isinstance(k, str) else (k[0], k[1], k[2] if len(k) > 2 else None)
            packed = self._packed(key)
            if packed is None or packed[1] == "bias":
                continue
            reason = (
                plain_lora((strength_patch, value, strength_model, offset, function))
                if packed[1] == "weight"
                else "a patch of quantization data"
            )
            if not reason:
                module = packed[0]
                up, down = value.weights[:2]
                rows = module.out_features if offset is None else offset[2]
                if down.shape[1] != module.in_features or up.shape[0] != rows:
                    reason = f"a LoRA of {up.shape[0]} x {down.shape[1]} on {rows} x {module.in_features} weights, made for another model,"
            if reason:
                raise UnsupportedPatch(
                    f"{key}: {reason} cannot be applied to a quantized layer in this version; plain LoRA can. "
                    "Apply it to the full-precision model before Nibble Quantize instead."
                )
        return super().add_patches(patches, strength_patch, strength_model)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        keys = [k if isinstance(k, str) else k[0] for k in patches]
        if refused := [k for k in keys if self._packed(k)]:
            raise UnsupportedPatch(
                f"hook LoRA (scheduled by Create Hook LoRA) on quantized layers is not supported in this version: {len(refused)} layers, first {refused[0]}"
            )
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def state_dict_for_saving(self, *args, **kwargs):
        """ComfyUI's save nodes would write packed bytes without their description: a file that nothing can load."""
        raise RuntimeError(
            "this model is quantized by Nibble; save it with Nibble Save Model, ComfyUI's own save nodes would lose its layer descriptions"
        )

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        packed = self._packed(key)
        if packed is None or packed[1] != "weight":
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        return packed[0].weight  # its patches are attached as branches in load()

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        self._attach()

    def partially_unload(self, *args, **kwargs):
        freed = super().partially_unload(*args, **kwargs)
        self._attach()
        return freed

    def _attach(self):
        for name, module in self.packed_layers():
            module.weight_function = []  # load() may have put a LowVramPatch there, which would requantize
            module.set_lora([branch(p, module.out_features) for p in self.patches.get(f"{name}.weight", [])])

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for _, module in self.packed_layers():
                module.set_lora([])
        super().unpatch_model(device_to, unpatch_weights)
