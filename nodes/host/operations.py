"""ComfyUI operations whose Linear holds a quantized layer where there is one."""

from collections.abc import Callable

import comfy.ops
import torch

from ...kernels import quant_linear
from ...kernels.lora import with_lora
from ...quant_core.linear import QuantizedLayer
from ...quant_core.spec import TENSOR_NAMES


class RequantizationError(RuntimeError):
    """Something tried to write a float weight into a packed layer."""


def is_quantized(module) -> bool:
    return getattr(module, "spec", None) is not None


def operations_for(take: Callable[[str], QuantizedLayer | None], prepare: Callable[[QuantizedLayer], QuantizedLayer]):
    """An operations class for `custom_operations`. take(module name within the diffusion model): its layer, or None. prepare(layer):
    the layer as it should run on this card; another one than was given is not what gets saved.

    `X.weight` stays a key of the state dict, where LoRA loaders look for it; it holds the packed bytes. No float weight of
    a quantized layer is ever allocated.
    """

    class NibbleOperations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            spec = None
            before = None  # a `kernels.before.Before` that the activation quantizer computes instead of a module in front
            original = None  # the layer as in the file, where it was requantized for this card

            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                torch.nn.Module.__init__(self)
                self.in_features, self.out_features = in_features, out_features
                self.weight = self.bias = None
                self.float_dtype = dtype
                self.lora = []
                self._with_lora = None

            def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
                layer = take(prefix.removesuffix("."))
                if layer is None:
                    self._load_float(state_dict, prefix, missing)
                    return
                if (layer.spec.in_features, layer.spec.out_features) != (self.in_features, self.out_features):
                    errors.append(
                        f"{layer.name}: the model has {self.out_features} x {self.in_features}, the file {layer.spec.out_features} x {layer.spec.in_features}"
                    )
                    return
                prepared = prepare(layer)
                self.original = layer if prepared is not layer else None
                self.spec, layer = prepared.spec, prepared
                for name in TENSOR_NAMES:
                    tensor = layer.tensors.get(name)
                    # register_parameter refuses names that are plain attributes already.
                    self.__dict__.pop(name, None)
                    self.register_parameter(name, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False))

            def _load_float(self, state_dict, prefix, missing):
                for name in ("weight", "bias"):
                    tensor = state_dict.get(prefix + name)
                    if tensor is None:
                        if name == "weight":
                            missing.append(prefix + name)
                        continue
                    self.__dict__.pop(name, None)
                    self.register_parameter(name, torch.nn.Parameter(tensor.to(self.float_dtype or tensor.dtype), requires_grad=False))

            def convert_weight(self, weight, inplace=False, **kwargs):
                """What ModelPatcher reads when this layer is merged into another model: real values."""
                return self.layer().dequantize() if is_quantized(self) else weight

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                if is_quantized(self):
                    raise RequantizationError("a patch would overwrite a packed weight; only plain LoRA can be added to a quantized layer")
                if return_weight:
                    return weight
                rounded = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
                if inplace_update:
                    self.weight.data.copy_(rounded)
                else:
                    self.weight = torch.nn.Parameter(rounded, requires_grad=False)
                return None

            def layer(self, name="") -> QuantizedLayer:
                """The quantized layer as a record sharing this module's tensors."""
                return QuantizedLayer(name, self.spec, {k: p.data for k in TENSOR_NAMES if (p := getattr(self, k, None)) is not None})

            def forward(self, x, *args, **kwargs):
                if not is_quantized(self):
                    return super().forward(x, *args, **kwargs)
                if self.weight_function:
                    raise RequantizationError("a weight patch reached a packed layer; only plain LoRA can be added to a quantized layer")
                tensors = {k: getattr(self, k) for k in TENSOR_NAMES}
                tensors = {k: p.to(x.device) for k, p in tensors.items() if p is not None}
                for function in self.bias_function:
                    tensors["bias"] = function(tensors["bias"])
                spec = self.spec
                if self.lora:
                    spec, low_rank = self._low_rank_with_lora(tensors, x)
                    tensors |= low_rank
                return quant_linear(x, spec, tensors, before=self.before)

            def set_lora(self, branches):
                """Triples (down (r, K), up (n, r) with the strength in it, first out-channel)."""
                self.lora, self._with_lora = branches, None

            def _low_rank_with_lora(self, tensors, x):
                """The spec and the low-rank tensors with the LoRA branches in, made once and not at each step."""
                key = (x.device, x.dtype)
                if self._with_lora is None or self._with_lora[0] != key:
                    branches = [(d.to(x.device), u.to(x.device), first) for d, u, first in self.lora]
                    spec, merged = with_lora(self.spec, tensors, branches, x.dtype)
                    self._with_lora = (key, spec, {k: merged[k] for k in ("proj_down", "proj_up")})
                return self._with_lora[1:]

    return NibbleOperations
