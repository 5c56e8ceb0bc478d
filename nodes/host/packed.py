"""A module of ComfyUI's network that holds a quantized layer, where there is one for it, in the place of a
float weight."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import comfy.float
import comfy.model_management
import torch

from ...kernels.dispatch import quant_linear
from ...kernels.operator.spec import TENSOR_NAMES, LinearSpec
from ...kernels.operator.transforms import channels_first, channels_last, kronecker
from ...quant_core.layer.adapters import Side, bias_correction
from ...quant_core.layer.linear import QuantizedLayer
from .attached import BIAS_OFFSET, DENSE, Attached, SideParameters, factor_names, set_parameter
from .real_values import FUNCTIONS, PackedWeight, PackedWeightError, RealValues


class RequantizationError(RuntimeError):
    """Something tried to write a float weight into a packed layer."""


@dataclass(frozen=True)
class Layers:
    """Where modules get their layers from. take(module name within the diffusion model): its layer, or None.
    prepare(layer): the layer as it should run on this card; another one than was given is not what gets
    saved."""

    take: Callable[[str], QuantizedLayer | None]
    prepare: Callable[[QuantizedLayer], QuantizedLayer]


def is_quantized(module: object) -> bool:
    """Whether a module of a network holds a quantized layer."""
    return getattr(module, "spec", None) is not None


class Packable:
    """In front of one of ComfyUI's own classes, which computes what is not quantized.

    `X.weight` stays a key of the state dict, where LoRA loaders look for it; it holds the packed bytes. No
    float weight of a quantized layer is ever allocated. A module gets its layer once, when its state dict
    loads; from then on only `attached`, and `spec` with it, change.
    """

    layers: Layers
    spec: LinearSpec | None = None  # of the layer as it runs, with what is attached; None in full precision
    original: QuantizedLayer | None = None  # as in the file, where it was requantized for this card
    spatial = 0  # dimensions of x behind the channels
    pointwise = True  # a linear layer, by whatever name; what is none stays ComfyUI's
    # Whether something stands in front of `forward`, which must see what the layer's input really is.
    wrapped = False

    def _begin(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None) -> None:
        self.in_features, self.out_features = in_features, out_features
        self._expected = ("weight", "bias") if bias else ("weight",)
        self.weight = self.bias = None
        self.float_dtype = dtype
        self.attached = Attached()

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of the model's own weight."""
        return (self.out_features, self.in_features) + (1,) * self.spatial

    # -- loading

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if not self.pointwise:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            return
        unexpected += [
            k for k in state_dict if k.startswith(prefix) and k.removeprefix(prefix) not in self._expected
        ]
        layer = self.layers.take(prefix.removesuffix("."))
        if layer is None:
            self._load_float(state_dict, prefix, missing, errors)
            return
        if layer.spec.logical_shape != self._shape:
            by = lambda shape: " x ".join(map(str, shape))
            errors.append(
                f"{layer.name}: the model has {by(self._shape)}, the file {by(layer.spec.logical_shape)}"
            )
            return
        if "bias" in self._expected and not layer.spec.bias:
            missing.append(f"{prefix}bias")
        self._hold(layer, self.layers.prepare(layer))

    def _hold(self, layer: QuantizedLayer, prepared: QuantizedLayer) -> None:
        """layer: as in the file. prepared: as it runs here."""
        self.original = layer if prepared is not layer else None
        self.spec = prepared.spec
        # The weight first, which `next(module.parameters())` gives to networks that ask for a dtype.
        for name in TENSOR_NAMES:
            tensor = prepared.tensors.get(name)
            parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            set_parameter(self, name, parameter)
        self.weight = PackedWeight.of(self, prepared.name, self.weight.data)
        self.weight_function = self.bias_function = []
        # ComfyUI after 0.33 computes layers under --fast fp16_accumulation itself, from real values, unless
        # they say this.
        self._full_precision_mm = True

    def _load_float(self, state_dict, prefix, missing, errors):
        for name in self._expected:
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                missing.append(prefix + name)
                continue
            shape = self._shape if name == "weight" else (self.out_features,)
            if tuple(tensor.shape) != shape:
                errors.append(f"{prefix}{name}: the model has {list(shape)}, the file {list(tensor.shape)}")
                continue
            values = tensor.to(self.float_dtype or tensor.dtype)
            set_parameter(self, name, torch.nn.Parameter(values, requires_grad=False))

    # -- what is held

    def layer(self, name: str = "") -> QuantizedLayer:
        """The quantized layer as a record sharing this module's tensors, without what is attached to it."""
        held = {k: getattr(self, k, None) for k in TENSOR_NAMES} | self.attached.own
        spec = self.spec if self.attached.alone else self.attached.own_spec
        return QuantizedLayer(name, spec, {k: held[k].data for k in TENSOR_NAMES if held[k] is not None})

    def attach(self, key: Hashable, make_side: Callable[[], Side], dtype: torch.dtype, keep: int = 0) -> None:
        """Puts a side beside the packed weight, in the place of what was there; an empty key takes it off.
        keep: former sides to hold on to, by key."""
        make = lambda: SideParameters.of(make_side(), self.layer(), dtype, self.weight.device)
        self.attached.put(self, key, make, keep)

    # -- real values, for who asks for a weight

    def real_weight(self, cast: torch.Tensor) -> torch.Tensor:
        """W (N, K, or what the model has) that the layer applies to x, with what is attached, in the dtype
        and on the device of `cast`."""
        tensors, stream = self._tensors_on(cast.device)
        own = {k: tensors[k] for k in TENSOR_NAMES if k in tensors}
        weight = QuantizedLayer("", self.spec, own).dequantize()
        for i, first in enumerate(self.attached.rows):
            left, right = (tensors[name].float() for name in factor_names(i))
            term = torch.kron(left, right)
            weight[first : first + len(term)] += term
        if DENSE in tensors:
            weight += tensors[DENSE].float()
        _release(stream, cast.device)
        return weight.to(cast.dtype).view(self._shape)

    def real_bias(self, cast: torch.Tensor) -> torch.Tensor:
        """The bias that goes with `real_weight`: the model's own."""
        return self.convert_bias(cast).to(cast.dtype)

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: object) -> torch.Tensor:
        """What ModelPatcher reads when this layer is merged into another model: real values."""
        if not is_quantized(self):
            return weight
        return self.layer().to(weight.device).dequantize().view(self._shape)

    def convert_bias(self, bias: torch.Tensor, inplace: bool = False, **kwargs: object) -> torch.Tensor:
        """The model's own bias: the stored one also holds the correction for shifted activations."""
        correction = bias_correction(self.layer()) if is_quantized(self) else None
        return bias if correction is None else bias + correction.to(bias.device)

    # -- values that ModelPatcher writes

    def set_bias(
        self,
        bias: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: object,
    ) -> torch.Tensor | None:
        """As ComfyUI's layers have it, for a bias as `convert_bias` gives it."""
        correction = bias_correction(self.layer()) if is_quantized(self) else None
        bias = (bias if correction is None else bias - correction.to(bias.device)).to(self.bias.dtype)
        return self._set("bias", bias, inplace_update, return_weight)

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: object,
    ) -> torch.Tensor | None:
        """As ComfyUI's layers have it; raises RequantizationError where the layer is quantized."""
        if is_quantized(self):
            raise RequantizationError(
                "a patch would overwrite a packed weight; adapters stand beside it instead"
            )
        rounded = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
        return self._set("weight", rounded, inplace_update, return_weight)

    def _set(self, name: str, tensor: torch.Tensor, inplace_update: bool, return_weight: bool):
        if return_weight:
            return tensor
        if inplace_update:
            getattr(self, name).data.copy_(tensor)
        else:
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))
        return None

    def __setattr__(self, name, value):
        if name == "forward":
            # ComfyUI's bypass loaders put their own there, which must see the layer's real input.
            super().__setattr__("wrapped", getattr(value, "__func__", None) is not type(self).forward)
        elif name in FUNCTIONS and is_quantized(self):
            value = RealValues.in_front_of(value, self, name)
        super().__setattr__(name, value)

    # -- computing

    def forward(
        self,
        x: torch.Tensor,
        *args: object,
        prologue: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """prologue: the module in front that the activation quantizer computes in its place, which was not
        called."""
        if not is_quantized(self):
            return super().forward(x, *args, **kwargs)
        self._require_computable(x)
        tensors, stream = self._tensors_on(x.device)
        self._change_bias(tensors)
        x = channels_last(x, self.spatial)
        rows = self.attached.rows
        if prologue is not None and (rows or DENSE in tensors):
            x, prologue = prologue(x), None
        own = {k: tensors[k] for k in TENSOR_NAMES if k in tensors}
        y = quant_linear(x, self.spec, own, prologue=prologue)
        for i, first in enumerate(rows):
            left, right = factor_names(i)
            term = kronecker(x, tensors[left].mT, tensors[right].mT)
            y[..., first : first + term.shape[-1]] += term
        if DENSE in tensors:
            y += torch.nn.functional.linear(x, tensors[DENSE].to(x.dtype))
        _release(stream, x.device)
        return channels_first(y, self.spatial)

    def _require_computable(self, x: torch.Tensor) -> None:
        if not x.is_floating_point():
            raise PackedWeightError(
                f"{getattr(self.weight, 'layer_name', '')}: expected x in floats, found {x.dtype}, the dtype "
                "of the packed weight. Cast x to the model's dtype, not to that of a weight."
            )
        if len(self.weight_function) > 1:
            raise RequantizationError(
                "a weight patch reached a packed layer, which only takes what ComfyUI's LoRA loaders make"
            )

    def _change_bias(self, tensors: dict[str, torch.Tensor]) -> None:
        """By what ComfyUI has put into `bias_function`, and by what a gain asks of a layer with shifted
        activations."""
        functions = self.bias_function[1:]
        if functions:
            tensors["bias"] = tensors["bias"].clone()  # they add in place
        for function in functions:
            tensors["bias"] = function(tensors["bias"])
        if BIAS_OFFSET in tensors:
            tensors["bias"] = tensors["bias"].float() + tensors[BIAS_OFFSET]

    def _tensors_on(self, device: torch.device):
        """({name: tensor on `device`}, the stream that copied or None). A layer left in memory is copied at
        each call, on a stream of its own, so that the copy runs beside the layer before it."""
        # No `:=` in here: torch.compile breaks the graph at it.
        names = (*TENSOR_NAMES, *self.attached.loose)
        held = {k: getattr(self, k) for k in names if getattr(self, k) is not None}
        held["weight"] = self.weight.detach()  # the codes as they are
        if self.weight.device == device:
            return {k: p if p.device == device else p.to(device) for k, p in held.items()}, None
        stream = comfy.model_management.get_offload_stream(device)
        non_blocking = comfy.model_management.device_supports_non_blocking(device)
        moved = {
            k: comfy.model_management.cast_to(p, None, device, non_blocking=non_blocking, stream=stream)
            for k, p in held.items()
        }
        comfy.model_management.sync_stream(device, stream)
        return moved, stream


def _release(stream, device: torch.device) -> None:
    """The copies of `_tensors_on` may go when what was computed from them is done."""
    if stream is not None:
        stream.wait_stream(comfy.model_management.current_stream(device))
