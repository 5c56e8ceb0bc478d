"""A ModelPatcher for packed layers: adapters stand beside them (`adapters.py`), packed bytes never change, all else is refused by name."""

import logging

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils

from . import unmatched
from .adapters import UnsupportedPatch, effective, refused, side_of
from .operations import is_quantized

unmatched.observe()
BYPASS = "bypass_lora"  # the key under which ComfyUI's bypass loaders keep their injections
EXAMPLES = 4


class Stack(tuple):
    """The patches of one layer, equal where they hold the same objects at the same strengths: hooks make new tuples at each step."""

    def __eq__(self, other):
        same = lambda p, q: p[1] is q[1] and (p[0], *p[2:]) == (q[0], *q[2:])
        return len(self) == len(other) and all(map(same, self, other))

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(tuple((p[0], id(p[1])) for p in self))


class NibblePatcher(comfy.model_patcher.ModelPatcher):
    """Not the dynamic variant: packed layers cast themselves and are counted with all their tensors."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        if not hasattr(model, "nibble_size"):
            model.nibble_size = comfy.model_management.module_size(model)  # before anything is attached
            model.nibble_hooked = False  # whether the attached sides have a hook's patches in them
        self._sides = None

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

    # -- what may be patched -------------------------------------------------------------------------------------------

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """As ModelPatcher's; raises UnsupportedPatch at once for what this model cannot take, before anything is changed."""
        missing = unmatched.keys_of(patches)
        self._check(patches, strength_patch, strength_model)
        if missing and not patches:
            raise UnsupportedPatch(unmatched.sentence(missing, "and none has a layer in this model, so the LoRA was made for another one"))
        added = super().add_patches(patches, strength_patch, strength_model)
        self._say(missing, added)
        return added

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        """As ModelPatcher's, for LoRAs whose strength a schedule sets. Raises UnsupportedPatch as `add_patches` does."""
        missing = unmatched.keys_of(patches)
        self._check(patches, strength_patch, strength_model)
        if missing and not patches:
            raise UnsupportedPatch(unmatched.sentence(missing, "and none has a layer in this model, so the hook would do nothing"))
        added = super().add_hook_patches(hook, patches, strength_patch, strength_model)
        self._say(missing, [])
        return added

    def _check(self, patches, strength_patch, strength_model):
        found = []
        for k, value in patches.items():
            key, offset, function = (k, None, None) if isinstance(k, str) else (k[0], k[1], k[2] if len(k) > 2 else None)
            packed = self._packed(key)
            reason, patch = "", (strength_patch, value, strength_model, offset, function)
            if packed is None:
                shape = self._float_shape(key)
                if shape is not None and hasattr(value, "weights") and getattr(value, "name", "") in ("lora", "loha", "lokr"):
                    reason = "" if value.calculate_shape(key) is not None else refused(patch, *shape)
            elif packed[1] == "weight":
                reason = refused(patch, packed[0].out_features, packed[0].in_features)
            elif packed[1] != "bias":
                reason = "a patch of quantization data"
            elif isinstance(value, list):
                reason = "a merge with another model"
            if reason:
                found.append(f"{key}: {reason}")
        if found:
            more = f" ({len(found)} such layers in all)" if len(found) > 1 else ""
            raise UnsupportedPatch(
                "; ".join(found[:EXAMPLES]) + f" cannot be put on this quantized model{more}. An adapter must be made for this "
                "architecture; merge models in full precision, before Nibble Quantize."
            )

    def _float_shape(self, key):
        """Shape (N, K) of a weight in 16 bit; None for anything else. ComfyUI would log a misfit there and go on without the LoRA."""
        try:
            weight = comfy.utils.get_attr(self.model, key)
        except AttributeError:
            return None
        return tuple(weight.shape) if key.endswith(".weight") and weight is not None and weight.ndim == 2 else None

    def _say(self, missing, added):
        if missing:
            logging.warning(f"Nibble: {unmatched.sentence(missing)}")
        if added:
            logging.info(f"Nibble: {self.lora_summary()}")

    def lora_summary(self) -> str:
        """One line about what adapters cost beside the packed layers."""
        sides = self._shapes()
        dense = [n for n, side in sides.items() if side.dense is not None]
        text = f"adapters on {len(sides)} packed layers, {self._side_bytes() / 2**20:.1f} MiB beside them"
        if dense:
            text += f"; {len(dense)} of them as dense matrices in 16 bit, which cost as much as the layer in full precision: {', '.join(dense[:EXAMPLES])}"
        return text + ", ..." * (len(dense) > EXAMPLES)

    def add_weight_wrapper(self, name, function):
        if self._packed(name):
            raise UnsupportedPatch(f"{name}: a weight wrapper sees float weights, and this layer is packed. Leave quantized layers out.")
        super().add_weight_wrapper(name, function)

    def set_injections(self, key, injections):
        """A second bypass loader joins the first, where ModelPatcher would drop the first; they are taken off in the opposite order."""
        if key == BYPASS:
            loaded, missing = unmatched.last()
            if missing:
                logging.warning(f"Nibble: {unmatched.sentence(missing)}")
            if sliced := [k[0] for k in loaded if not isinstance(k, str)]:
                logging.warning(
                    f"Nibble: {unmatched.sentence(sliced, 'for parts of fused layers are left out by the bypass loader')}. Load this "
                    "LoRA with LoraLoaderModelOnly, which changes no packed weight either."
                )
            if key in self.injections:
                injections = [_both(self.injections[key], injections)]
        super().set_injections(key, injections)

    def state_dict_for_saving(self, *args, **kwargs):
        """ComfyUI's save nodes would write packed bytes without their description: a file that nothing can load."""
        raise RuntimeError(
            "this model is quantized by Nibble; save it with Nibble Save Model, ComfyUI's own save nodes would lose its layer descriptions"
        )

    # -- memory --------------------------------------------------------------------------------------------------------

    def model_size(self):
        """Bytes of all tensors, scales and adapters included; adapters of this clone, whichever clone is loaded."""
        return self.model.nibble_size + self._side_bytes()

    def _shapes(self):
        """{layer: Side without values} of the patched packed layers. Kept until the patches change, with the bytes they take."""
        if self._sides is None or self._sides[0] != self.patches_uuid:
            dtype, shapes, total = self.model.get_dtype_inference(), {}, 0
            for name, module in self.packed_layers():
                if patches := effective(self.patches.get(f"{name}.weight", [])):
                    layer = module.layer(name).to("meta")
                    shapes[name] = side_of(patches, layer, name, "meta")
                    total += shapes[name].nbytes(layer, dtype)
            self._sides = (self.patches_uuid, shapes, total)
        return self._sides[1]

    def _side_bytes(self):
        self._shapes()
        return self._sides[2]

    # -- loading -------------------------------------------------------------------------------------------------------

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        packed = self._packed(key)
        if packed is None or packed[1] == "bias":
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        return getattr(*packed)  # patches stand beside it since load()

    def load(self, *args, **kwargs):
        self.unpatch_hooks()
        self._attach(self.patches)  # before the sizes are taken
        super().load(*args, **kwargs)
        self._take_off_functions()

    def partially_unload(self, *args, **kwargs):
        freed = super().partially_unload(*args, **kwargs)
        self._take_off_functions()
        return freed

    def _take_off_functions(self):
        """ModelPatcher puts a LowVramPatch on layers it leaves in memory. On a packed weight it would requantize; on a tensor that was
        patched when its layer still fitted, which is in `backup`, it would act a second time."""
        for _, module in self.packed_layers():
            module.weight_function = []
        for key in self.backup:
            name, _, leaf = key.rpartition(".")
            module = comfy.utils.get_attr(self.model, name)
            functions = getattr(module, f"{leaf}_function", ())
            if any(getattr(f, "is_lowvram_patch", False) for f in functions):
                setattr(module, f"{leaf}_function", [f for f in functions if not getattr(f, "is_lowvram_patch", False)])

    def _attach(self, patches, keep=0):
        """Puts beside each packed layer what `patches`, {key: list}, ask for. A layer that has it already is left alone. keep: how many
        former sides a layer may hold on to, for hooks that take turns within a step."""
        dtype = self.model.get_dtype_inference()
        for name, module in self.packed_layers():
            wanted = effective(patches.get(f"{name}.weight", []))
            key = Stack(wanted)
            if key != module.attached:
                module.attach(key, lambda name=name, module=module, wanted=wanted: self._side(name, module, wanted), dtype, keep)

    def _side(self, name, module, patches):
        """The side, on the layer's device; on the computing one where it takes the dequantized weight."""
        layer = module.layer(name)
        shape = side_of(patches, layer.to("meta"), name, "meta")
        heavy = shape.gain is not None or shape.dense is not None
        return side_of(patches, layer, name, comfy.model_management.get_torch_device() if heavy else module.weight.device)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.model.nibble_hooked = False
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._attach({})  # after the move, so that a layer's own tensors, left in memory, need none

    # -- hooks: LoRAs on a schedule or on one conditioning ---------------------------------------------------------------

    def patch_hooks(self, hooks):
        self._patching_hooks = True
        try:
            super().patch_hooks(hooks)  # biases and layers in 16 bit
        finally:
            self._patching_hooks = False
        combined = self.get_combined_hook_patches(hooks)
        packed = {k: v for k, v in combined.items() if (found := self._packed(k)) and found[1] == "weight"}
        if packed or self.model.nibble_hooked:
            self._attach(self.patches | {k: self.patches.get(k, []) + v for k, v in packed.items()}, keep=3)
            self.model.nibble_hooked = bool(packed)

    _patching_hooks = False

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        packed = self._packed(key)
        if packed is None or packed[1] == "bias":
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set=None):
        super().unpatch_hooks(whitelist_keys_set)
        if self.model.nibble_hooked and not self._patching_hooks:
            self._attach(self.patches)
            self.model.nibble_hooked = False


def _both(first, second) -> comfy.patcher_extension.PatcherInjection:
    def inject(patcher):
        for injection in (*first, *second):
            injection.inject(patcher)

    def eject(patcher):
        for injection in (*reversed(second), *reversed(first)):
            injection.eject(patcher)

    return comfy.patcher_extension.PatcherInjection(inject=inject, eject=eject)
