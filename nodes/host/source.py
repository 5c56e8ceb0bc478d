"""Full-precision weights out of a MODEL, with the LoRA patches on it merged."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor

from ...quant_core.families import detect
from ...quant_core.families.fingerprint import fingerprint
from ...quant_core.formats.kitchen.declared import SOURCES, Declaration
from ...quant_core.formats.kitchen.dense import weight_of
from ...quant_core.formats.scaled import computable
from .adapters import reshaped, times, wanted
from .bare import PREFIX, WRAPPED, bare, original
from .bypass import as_injected, patches_of
from .inherited import EXAMPLES, require_inheritable
from .merging import unmergeable
from .operations import replaceable


class QuantizedSource(RuntimeError):
    """The model is quantized already."""


class MisfitPatch(ValueError):
    """A LoRA, or what else patches weights, was made for another model."""


def dense_layers(modules: Mapping[str, torch.nn.Module]) -> dict[str, Declaration]:
    """{name: what it is} of the modules that ComfyUI holds in fp8, nvfp4, mxfp8 or asym_w4a8_int8."""
    found = {}
    for name, module in modules.items():
        if (kind := getattr(module, "quant_format", None)) in SOURCES:
            held = getattr(module.weight, "_params", None)
            rotation, group = getattr(held, "convrot_groupsize", 0), getattr(held, "group_size", 0)
            found[name] = Declaration(kind, rotation, group=group)
    return found


class ModelSource:
    """A ModelPatcher as a source of weights under ComfyUI's key names, whatever its clones have left in the
    model that they share.

    shapes: {key: shape}; family; layers: those to quantize, as its family has them before any calibration;
    network, modules: the bare network and {name: module} of it; get(key): the weight with its patches merged,
    in its own float dtype, those below 16 bit in bf16; kinds: {format below 16 bit: layers in it}.

    Raises, before anything is read but names and shapes, QuantizedSource, NotInheritable and MisfitPatch for
    what is on the model and cannot be quantized with it.
    """

    def __init__(self, patcher: ModelPatcher) -> None:
        self.patcher = patcher
        with bare(patcher) as model:
            self.network = model.diffusion_model
            self.modules = dict(self.network.named_modules())
            state_dict = self.network.state_dict()
        self._dense = dense_layers(self.modules)
        self.kinds = Counter(declared.format for declared in self._dense.values())
        for key in list(state_dict):
            name, _, leaf = key.rpartition(".")
            if name in self._dense:
                if leaf not in ("weight", "bias"):
                    del state_dict[key]
                else:  # the weight in its real shape, as it is nowhere stored
                    state_dict[key] = getattr(self.modules[name], leaf)
        # Integers that are no weights say something beside them, as ComfyUI's `X.comfy_attention.config` of
        # uint8 does.
        weights = [
            (k, t)
            for k, t in state_dict.items()
            if k.rpartition(".")[2] in ("weight", "qweight", "comfy_quant")
        ]
        if packed := [k for k, t in weights if not t.is_floating_point() or k.endswith(".comfy_quant")]:
            kind = getattr(self.modules[packed[0].rpartition(".")[0]], "quant_format", None)
            raise QuantizedSource(
                f"this model is quantized already ({len(packed)} packed tensors, first "
                f"{packed[0]}{f' in {kind}' if kind else ''}); connect the full-precision model"
            )
        require_inheritable(patcher)
        self.shapes = {k: tuple(t.shape) for k, t in state_dict.items()}
        self.family = detect(self.shapes)
        # A rule about names may take an embedding for a layer, or a convolution with strides.
        self.layers = [
            layer for layer in self.family.layers(self.shapes) if replaceable(self.modules[layer.name])
        ]
        self._patches = {
            key.replace(WRAPPED, ""): list(patches) for key, patches in patcher.patches.items() if patches
        }
        self._bypassed = patches_of(patcher, {module: name for name, module in self.modules.items()})
        self._require_fit()

    def _require_fit(self):
        """Takes out patches that do not fit a layer which stays in 16 bit, as ComfyUI passes over them (a
        LoRA of FLUX.1 dev on Fill, whose first layer is wider), and says so. Any other misfit is a LoRA of
        another model."""
        quantized = {f"{layer.name}.weight" for layer in self.layers}
        misfits, left_out = [], []
        for full, patches in self._patches.items():
            key = full.removeprefix(PREFIX)
            if not full.startswith(PREFIX) or key not in self.shapes:
                misfits.append(f"a patch of {full}, which is no tensor of the network")
                continue
            fitting = []
            for patch in patches:
                if reason := unmergeable(patch, self.shapes[key]):
                    found = misfits if key in quantized else left_out
                    found.append(f"{key}: {reason}")
                    continue
                fitting.append(patch)
                if shape := reshaped(patch[1], wanted(patch, self.shapes[key])):
                    misfits.append(
                        f"{key}: a LoRA that makes {times(shape)} weights of {times(self.shapes[key])}"
                    )
            self._patches[full] = fitting
        for name, patches in self._bypassed.items():
            key = f"{name}.weight"
            misfits += [
                f"{key}: {reason}" for patch in patches if (reason := unmergeable(patch, self.shapes[key]))
            ]
        if left_out and not self._bypassed and not any(self._patches.values()):
            misfits = left_out
        if misfits:
            more = f" and {len(misfits) - EXAMPLES} more" if len(misfits) > EXAMPLES else ""
            raise MisfitPatch(
                f"{'; '.join(misfits[:EXAMPLES])}{more}: cannot be merged. Take the LoRA, or merge, of "
                "another model out; one that enlarges a layer goes behind the quantized model."
            )
        if left_out:
            logging.warning(
                "Nibble: left out, as ComfyUI does: "
                f"{'; '.join(left_out[:EXAMPLES])}{', ...' * (len(left_out) > EXAMPLES)}"
            )

    def _base(self, key, convert=True):
        """A tensor before any patch, in a dtype that has arithmetic. convert: to the values that the module's
        own operations make of it."""
        name, _, leaf = key.rpartition(".")
        module = self.modules[name]
        held = original(self.patcher, PREFIX + key, getattr(module, leaf))
        if name in self._dense and leaf == "weight":
            # ComfyUI's own way to real values rounds the scale to bf16 first.
            parts = held.state_dict("weight") | {"pre_quant_scale": getattr(module, "pre_quant_scale", None)}
            return weight_of(self._dense[name], parts.get)
        if convert and hasattr(module, f"convert_{leaf}"):
            copy = held.to(comfy.model_management.get_torch_device(), copy=True)
            held = getattr(module, f"convert_{leaf}")(copy, inplace=True)
        return computable(held).detach()

    def get(self, key: str) -> torch.Tensor:
        base = self._base(key)
        name, _, leaf = key.rpartition(".")
        patches = [
            *self._patches.get(PREFIX + key, ()),
            *(self._bypassed.get(name, ()) if leaf == "weight" else ()),
        ]
        if not patches:
            return base
        # In fp32, and only then in the base's dtype: a LoRA merged in fp8 would mostly be rounded away.
        weight = base.to(comfy.model_management.get_torch_device(), torch.float32, copy=True)
        return comfy.lora.calculate_weight(
            patches, weight, PREFIX + key, original_weights={PREFIX + key: [(base, None)]}
        ).to(base.dtype)

    def fingerprint(self) -> str:
        """Of the base weights and, where there are any, of the patches."""
        base = fingerprint(self.family.mapped(self.shapes), lambda key: self._base(key, convert=False))
        if not self._patches and not self._bypassed:
            return base
        patches = {key: list(held) for key, held in self._patches.items()}
        for name, bypassed in self._bypassed.items():
            dtype = self.modules[name].weight.dtype
            patches.setdefault(f"{PREFIX}{name}.weight", []).extend(
                as_injected(patch, dtype) for patch in bypassed
            )
        digest = hashlib.sha256(base.encode())
        feed(digest, patches)
        return digest.hexdigest()[:16]


def feed(digest: "hashlib._Hash", value: object) -> None:
    """Hashes tensors (up to 4096 values each), numbers, text and any nesting of them; functions by their
    name."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1)
        digest.update(
            str(tuple(value.shape)).encode()
            + flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes()
        )
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            feed(digest, value[key])
    elif isinstance(value, NestedTensor):  # latents of video and sound
        feed(digest, value.unbind())
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            feed(digest, item)
    elif hasattr(value, "weights"):  # a LoRA, LoHa, LoKr ... adapter
        digest.update(type(value).__name__.encode())
        feed(digest, value.weights)
    else:
        digest.update(
            (
                repr(value)
                if isinstance(value, (int, float, str, bool, type(None)))
                else type(value).__name__
            ).encode()
        )
