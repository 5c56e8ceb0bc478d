"""A ModelPatcher for packed layers: adapters stand beside them (`adapters.py`), packed bytes never change,
all else is refused by name."""

import functools
import logging
from collections.abc import ItemsView
from typing import NoReturn

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.utils
import torch

from . import unmatched
from .adapters import UnsupportedPatch, effective, side_of
from .bare import WRAPPED, in_network
from .fitting import EXAMPLES, Target, left_out, of_another_shape, sort
from .packed import Packable, is_quantized
from .real_values import PackedWeight

MADE_FOR_ANOTHER = "the LoRA was made for another one"
BYPASS = "bypass_lora"  # the key under which ComfyUI's bypass loaders keep their injections


class Stack(tuple):
    """The patches of one layer, equal where they hold the same objects at the same strengths: hooks make new
    tuples at each step."""

    def __eq__(self, other):
        same = lambda p, q: p[1] is q[1] and (p[0], *p[2:]) == (q[0], *q[2:])
        return len(self) == len(other) and all(map(same, self, other))

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(tuple((p[0], id(p[1])) for p in self))


class NibblePatcher(comfy.model_patcher.ModelPatcher):
    """Not the dynamic variant: packed layers cast themselves and are counted with all their tensors."""

    def __init__(self, model: torch.nn.Module, *args: object, **kwargs: object) -> None:
        super().__init__(model, *args, **kwargs)
        _observe_loaders()
        if not hasattr(model, "nibble_size"):
            model.nibble_size = comfy.model_management.module_size(model)  # before anything is attached
            model.nibble_hooked = False  # whether the attached sides have a hook's patches in them
            # Under their names at first: clones may wrap blocks, which gives all that is in them other names.
            model.nibble_layers = {
                name: module for name, module in model.named_modules() if is_quantized(module)
            }
        self._sides = self._logged = None

    def packed_layers(self) -> ItemsView[str, Packable]:
        """(name, module) of the quantized layers; names as in the state dict, without a leaf."""
        return self.model.nibble_layers.items()

    def _packed(self, key):
        """(module, leaf) where the state dict key belongs to a quantized layer, else None."""
        name, _, leaf = key.replace(WRAPPED, "").rpartition(".")
        module = self.model.nibble_layers.get(name)
        return None if module is None else (module, leaf)

    # -- what may be patched

    def add_patches(
        self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0, **kwargs: object
    ) -> list:
        """As ModelPatcher's; raises UnsupportedPatch at once for what this model cannot take, before anything
        is changed."""
        taken, left_out = self._fitting(patches, strength_patch, strength_model, MADE_FOR_ANOTHER)
        return super().add_patches(taken, strength_patch, strength_model, **kwargs) + left_out

    def add_hook_patches(
        self,
        hook: comfy.hooks.Hook,
        patches: dict,
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
        **kwargs: object,
    ) -> list:
        """As ModelPatcher's, for LoRAs whose strength a schedule sets. Raises UnsupportedPatch as
        `add_patches` does."""
        taken, left_out = self._fitting(patches, strength_patch, strength_model, "the hook would do nothing")
        return super().add_hook_patches(hook, taken, strength_patch, strength_model, **kwargs) + left_out

    def _fitting(self, patches, strength_patch, strength_model, otherwise):
        """(patches to hand on, keys of the rest). Warns of what the file they came from has for no layer, or
        for one of another shape."""
        missing = unmatched.keys_of(patches)
        if missing and not patches:
            raise UnsupportedPatch(
                unmatched.sentence(missing, f"and none has a layer in this model, so {otherwise}")
            )
        found = sort(patches, (strength_patch, strength_model), self._target, unmatched.file_of(patches))
        if missing:
            logging.warning(f"Nibble: {unmatched.sentence(missing)}")
        if found.misfits:
            logging.warning(f"Nibble: {left_out(found.misfits)}")
        return found.taken, [k for k in patches if k not in found.taken]

    def _target(self, key):
        """What a key of the state dict stands for; None where there is no tensor."""
        if packed := self._packed(key):
            module, leaf = packed
            shape = module.spec.logical_shape if leaf == "weight" else (module.out_features,)
            return Target(shape, leaf)
        try:
            tensor = comfy.utils.get_attr(self.model, key)
        except AttributeError:
            return None
        if key in self.backup:  # a loaded clone has its own patches in there
            tensor = self.backup[key].weight
        if not torch.is_tensor(tensor):
            return None
        return Target(tuple(comfy.lora.calculate_shape(self.patches.get(key, []), tensor, key)))

    def lora_summary(self) -> str:
        """One line about what adapters cost beside the packed layers."""
        sides = self._shapes()
        dense = [n for n, side in sides.items() if side.dense is not None]
        text = f"adapters on {len(sides)} packed layers, {self._side_bytes() / 2**20:.1f} MiB beside them"
        if dense:
            text += (
                f"; {len(dense)} of them as dense matrices in 16 bit, which cost as much as the layer in "
                f"full precision: {', '.join(dense[:EXAMPLES])}"
            )
        return text + ", ..." * (len(dense) > EXAMPLES)

    def add_weight_wrapper(self, name: str, *args: object, **kwargs: object) -> None:
        if self._packed(name):
            raise UnsupportedPatch(
                f"{name}: a weight wrapper sees float weights, and this layer is packed. Leave quantized "
                "layers out."
            )
        super().add_weight_wrapper(name, *args, **kwargs)

    def set_injections(
        self,
        key: str,
        injections: list[comfy.patcher_extension.PatcherInjection],
        *args: object,
        **kwargs: object,
    ) -> None:
        """A second bypass loader joins the first, where ModelPatcher would drop the first; they are taken off
        in the opposite order."""
        if key == BYPASS:
            self._check_bypass()
            if key in self.injections:
                injections = [_joined(self.injections[key], injections)]
        super().set_injections(key, injections, *args, **kwargs)

    def _check_bypass(self):
        """Its adapters act on a layer's output, so one of another shape would stop the sampler, and the
        loader has no place for offsets."""
        loaded, missing = unmatched.last()
        hooked = {
            k: v
            for k, v in loaded.items()
            if isinstance(k, str) and "multiplier" in getattr(v, "__dict__", ())
        }  # set by its hook
        if misfits := of_another_shape(hooked, self._target):
            what = (
                "of the LoRA file made for layers of another shape, at which the bypass loader would stop "
                "the sampler"
            )
            raise UnsupportedPatch(
                f"{left_out(misfits, what)}. Load this LoRA with LoraLoaderModelOnly, which leaves them out."
            )
        if missing:
            logging.warning(f"Nibble: {unmatched.sentence(missing)}")
        if sliced := [k[0] for k in loaded if not isinstance(k, str)]:
            what = "for parts of fused layers are left out by the bypass loader"
            logging.warning(
                f"Nibble: {unmatched.sentence(sliced, what)}. Load this LoRA with LoraLoaderModelOnly, which "
                "changes no packed weight either."
            )

    def get_key_patches(self, filter_prefix: str | None = None, **kwargs: object) -> dict[str, list]:
        """As ModelPatcher's, with packed codes as plain tensors: a merge casts them before it asks
        `convert_weight` for real values."""
        found = super().get_key_patches(filter_prefix, **kwargs)
        for key, ((weight, *convert), *patches) in found.items():
            if isinstance(weight, PackedWeight):
                found[key] = [(weight.data, *convert), *patches]
        return found

    def state_dict_for_saving(self, *args: object, **kwargs: object) -> NoReturn:
        """ComfyUI's save nodes would write packed bytes without their description: a file that nothing can
        load."""
        raise RuntimeError(
            "this model is quantized by Nibble; save it with Nibble Save Model, ComfyUI's own save nodes "
            "would lose its layer descriptions"
        )

    # -- memory

    def model_size(self) -> int:
        """Bytes of all tensors, scales and adapters included; adapters of this clone, whichever clone is
        loaded."""
        return self.model.nibble_size + self._side_bytes()

    def _shapes(self):
        """{layer: Side without values} of the patched packed layers. Kept until the patches change, with the
        bytes they take."""
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

    # -- loading

    def patch_weight_to_device(self, key: str, *args: object, **kwargs: object) -> torch.Tensor | None:
        packed = self._packed(key)
        # What stands beside a packed weight is there since load(). A bias in `backup` was patched when its
        # layer was left in memory.
        if packed is not None and (packed[1] != "bias" or key in self.backup):
            return getattr(*packed)
        return super().patch_weight_to_device(key, *args, **kwargs)

    def load(self, *args: object, **kwargs: object) -> None:
        self.unpatch_hooks()
        self._attach(self.patches)  # before the sizes are taken
        if self._logged != self.patches_uuid and self._shapes():
            logging.info(f"Nibble: {self.lora_summary()}")
        self._logged = self.patches_uuid
        super().load(*args, **kwargs)
        self._take_off_functions()

    def partially_unload(self, *args: object, **kwargs: object) -> int:
        freed = super().partially_unload(*args, **kwargs)
        self._take_off_functions()
        return freed

    def _take_off_functions(self):
        """ModelPatcher puts a LowVramPatch on layers it leaves in memory. On a packed weight it would
        requantize; on a packed layer's bias it would see the correction for shifted activations, so the bias
        is patched where it lies; on a tensor that was patched when its layer still fitted, which is in
        `backup`, it would act a second time."""
        for name, module in self.packed_layers():
            module.weight_function = []
            if _without_patches(module, "bias") and (key := f"{name}.bias") not in self.backup:
                self.unpin_weight(key)
                self.patch_weight_to_device(key)
                self.pin_weight_to_device(key)
        for key in self.backup:
            name, _, leaf = key.rpartition(".")
            _without_patches(comfy.utils.get_attr(self.model, name), leaf)

    def _attach(self, patches, keep=0):
        """Puts beside each packed layer what `patches`, {key: list}, ask for. A layer that has it already is
        left alone. keep: how many former sides a layer may hold on to, for hooks that take turns within a
        step."""
        dtype = self.model.get_dtype_inference()
        for name, module in self.packed_layers():
            wanted = effective(patches.get(f"{name}.weight", []))
            key = Stack(wanted)
            if key != module.attached.key:
                module.attach(
                    key,
                    lambda name=name, module=module, wanted=wanted: self._side(name, module, wanted),
                    dtype,
                    keep,
                )

    def _side(self, name, module, patches):
        """The side, on the layer's device; on the computing one where it takes the dequantized weight."""
        layer = module.layer(name)
        shape = side_of(patches, layer.to("meta"), name, "meta")
        heavy = shape.gain is not None or shape.dense is not None
        return side_of(
            patches, layer, name, comfy.model_management.get_torch_device() if heavy else module.weight.device
        )

    def cleanup(self, **kwargs: object) -> None:
        """As ModelPatcher's, at the end of a sampling run; and takes off what this clone has put on the
        shared network, which the next run puts on again: LoRA loaders would not find their keys in wrapped
        blocks."""
        super().cleanup(**kwargs)
        for name in [name for name in self.object_patches_backup if in_network(name)]:
            comfy.utils.set_attr(self.model, name, self.object_patches_backup.pop(name))

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True, **kwargs: object
    ) -> None:
        if unpatch_weights:
            self.model.nibble_hooked = False
        super().unpatch_model(device_to, unpatch_weights, **kwargs)
        if unpatch_weights:
            self._attach({})  # after the move, so that a layer's own tensors, left in memory, need none

    # -- hooks: LoRAs on a schedule or on one conditioning

    def patch_hooks(self, hooks: comfy.hooks.HookGroup, *args: object, **kwargs: object) -> None:
        self._patching_hooks = True
        try:
            super().patch_hooks(hooks, *args, **kwargs)  # biases and layers in 16 bit
        finally:
            self._patching_hooks = False
        combined = self.get_combined_hook_patches(hooks)
        packed = {k: v for k, v in combined.items() if (found := self._packed(k)) and found[1] == "weight"}
        if packed or self.model.nibble_hooked:
            self._attach(self.patches | {k: self.patches.get(k, []) + v for k, v in packed.items()}, keep=3)
            self.model.nibble_hooked = bool(packed)

    _patching_hooks = False

    def patch_hook_weight_to_device(
        self, hooks: comfy.hooks.HookGroup, combined_patches: dict, key: str, *args: object, **kwargs: object
    ) -> None:
        packed = self._packed(key)
        if packed is None or packed[1] == "bias":
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)
            cached = self.cached_hook_patches.get(hooks, {})
            # ModelPatcher copies it back as it is, so the bias as stored and not the model's own.
            if packed and key in cached:
                cached[key] = (packed[0].bias.detach().to(cached[key][0].device, copy=True), cached[key][1])

    def unpatch_hooks(self, *args: object, **kwargs: object) -> None:
        super().unpatch_hooks(*args, **kwargs)
        if self.model.nibble_hooked and not self._patching_hooks:
            self._attach(self.patches)
            self.model.nibble_hooked = False


def _joined(first, second) -> comfy.patcher_extension.PatcherInjection:
    def inject(patcher):
        for injection in (*first, *second):
            injection.inject(patcher)

    def eject(patcher):
        for injection in (*reversed(second), *reversed(first)):
            injection.eject(patcher)

    return comfy.patcher_extension.PatcherInjection(inject=inject, eject=eject)


@functools.cache
def _observe_loaders():
    """Once, with the first model: importing this changes nothing of ComfyUI's. Not again with the next ones,
    as another pack may have wrapped what we did."""
    unmatched.observe()
    _refuse_idle_bypass()


def _without_patches(module, leaf) -> bool:
    """Takes ModelPatcher's patches off the functions of a tensor. Whether there was one."""
    functions = getattr(module, f"{leaf}_function", ())
    kept = [f for f in functions if not getattr(f, "is_lowvram_patch", False)]
    if len(kept) == len(functions):
        return False
    setattr(module, f"{leaf}_function", kept)
    return True


def _refuse_idle_bypass():
    """Wraps ComfyUI's bypass loader, once: where no key of a file has a layer it changes nothing and calls
    nothing of the model's."""
    inner = comfy.sd.load_bypass_lora_for_models
    if hasattr(inner, "nibble_observes"):
        return

    @functools.wraps(inner)
    def load_bypass_lora_for_models(model, *args, **kwargs):
        made = inner(model, *args, **kwargs)
        loaded, missing = unmatched.last()
        if isinstance(model, NibblePatcher) and missing and not loaded:
            raise UnsupportedPatch(
                unmatched.sentence(missing, f"and none has a layer in this model, so {MADE_FOR_ANOTHER}")
            )
        return made

    load_bypass_lora_for_models.nibble_observes = True
    comfy.sd.load_bypass_lora_for_models = load_bypass_lora_for_models
