"""Full-precision weights out of a MODEL, with the LoRA patches on it merged."""

import hashlib

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import get_key_weight
from comfy.nested_tensor import NestedTensor

from ...quant_core.calibration.file import fingerprint
from ...quant_core.families import detect
from ...quant_core.formats.scaled import FP8, real_values

PREFIX = "diffusion_model."


class QuantizedSource(RuntimeError):
    """The model is quantized already."""


class ModelSource:
    """A ModelPatcher as a source of weights under ComfyUI's key names.

    shapes: {key: shape}; family; layers: those to quantize, as its family has them before any calibration; get(key): the weight with
    its patches merged, in its own float dtype, scaled fp8 in bf16.
    """

    def __init__(self, patcher):
        self.patcher = patcher
        network = patcher.model.diffusion_model
        state_dict = network.state_dict()
        self._fp8 = {name for name, module in network.named_modules() if getattr(module, "quant_format", None) in FP8}
        for key in list(state_dict):
            name, _, leaf = key.rpartition(".")
            if name in self._fp8 and leaf not in ("weight", "bias"):
                del state_dict[key]
        if packed := [k for k, t in state_dict.items() if t.dtype in (torch.int8, torch.uint8)]:
            raise QuantizedSource(
                f"this model is quantized already ({len(packed)} packed tensors, first {packed[0]}); connect the full-precision model"
            )
        self.keys = list(state_dict)
        self.shapes = {k: tuple(t.shape) for k, t in state_dict.items()}
        self.family = detect(self.shapes)
        # A rule about names may take an embedding for a layer, and only ComfyUI's own operations can be replaced by ours.
        takes = lambda layer: isinstance(network.get_submodule(layer.name), (torch.nn.Linear, comfy.ops.CastWeightBiasOp))
        self.layers = [layer for layer in self.family.layers(self.shapes) if takes(layer)]

    def _base(self, key):
        weight, _, convert = get_key_weight(self.patcher.model, PREFIX + key)
        backup = self.patcher.backup.get(PREFIX + key)
        weight = weight if backup is None else backup.weight
        name, _, leaf = key.rpartition(".")
        if name not in self._fp8 or leaf != "weight":
            return weight, convert
        held = weight.state_dict("")  # ComfyUI's own way to real values rounds the scale to bf16 first
        return real_values(held[""], held["_scale"]), None

    def get(self, key) -> torch.Tensor:
        weight, convert = self._base(key)
        patches = self.patcher.patches.get(PREFIX + key)
        if convert is not None:
            weight = convert(weight.to(comfy.model_management.get_torch_device(), copy=True), inplace=True)
        if not patches:
            return weight.detach()
        dtype = weight.dtype
        merged = comfy.lora.calculate_weight(
            patches, weight.to(comfy.model_management.get_torch_device(), torch.float32, copy=True), PREFIX + key
        )
        return merged.to(dtype)

    def fingerprint(self) -> str:
        """Of the base weights and, where there are any, of the patches."""
        base = fingerprint(self.family.layers(self.shapes), lambda k: self._base(k)[0])
        if not self.patcher.patches:
            return base
        digest = hashlib.sha256(base.encode())
        feed(digest, self.patcher.patches)
        return digest.hexdigest()[:16]


def feed(digest, value):
    """Hashes tensors (up to 4096 values each), numbers, text and any nesting of them; functions by their name."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1)
        digest.update(str(tuple(value.shape)).encode() + flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
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
        digest.update((repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__).encode())
