"""ComfyUI operations whose Linear, and 1x1 Conv1d and Conv2d, hold a quantized layer where there is one."""

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.ops
import torch

from ...kernels.dispatch import quant_linear
from ...kernels.operator.spec import TENSOR_NAMES, LinearSpec
from ...kernels.operator.transforms import channels_first, channels_last, kronecker
from ...quant_core.layer.adapters import Side, bias_correction
from ...quant_core.layer.linear import QuantizedLayer
from .real_values import FUNCTIONS, PackedWeight, PackedWeightError, RealValues

BIAS_OFFSET, DENSE = (
    "bias_offset",
    "dense",
)  # tensors of an attached side, beside those of TENSOR_NAMES and the Kronecker factors


class RequantizationError(RuntimeError):
    """Something tried to write a float weight into a packed layer."""


@dataclass(frozen=True)
class Attached:
    """A side as parameters of a layer: `spec` with its low rank in, tensors by name, first out-channel of
    each Kronecker product."""

    spec: LinearSpec
    parameters: dict[str, torch.nn.Parameter]
    rows: tuple[int, ...]


def is_quantized(module) -> bool:
    return getattr(module, "spec", None) is not None


def replaceable(module) -> bool:
    """Whether a module of a network is one that ours can stand for: ComfyUI's linear layer, or its
    convolution where that is one."""
    if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)):
        return isinstance(module, comfy.ops.CastWeightBiasOp) and is_pointwise(module)
    # Embeddings cast their weights as linear layers do, and their shapes tell nothing.
    return isinstance(module, torch.nn.Linear) or (
        isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, "in_features")
    )


def is_pointwise(convolution) -> bool:
    """Whether a convolution is a linear layer over the channels."""
    sizes = (*convolution.kernel_size, *convolution.stride, convolution.groups)
    return all(n == 1 for n in sizes) and (
        isinstance(convolution.padding, str) or not any(convolution.padding)
    )


def operations_for(
    take: Callable[[str], QuantizedLayer | None], prepare: Callable[[QuantizedLayer], QuantizedLayer]
):
    """An operations class for `custom_operations`. take(module name within the diffusion model): its layer,
    or None. prepare(layer): the layer as it should run on this card; another one than was given is not what
    gets saved.

    `X.weight` stays a key of the state dict, where LoRA loaders look for it; it holds the packed bytes. No
    float weight of a quantized layer is ever allocated.
    """

    class NibbleOperations(comfy.ops.manual_cast):
        class Packable:
            spec = None
            spatial = 0  # dimensions of x behind the channels
            pointwise = True  # a linear layer, by whatever name; what is none stays ComfyUI's
            # Whether something stands in front of `forward`, which must see what the layer's input really is.
            wrapped = False
            original = None  # the layer as in the file, where it was requantized for this card
            attached = ()  # the key of the side beside this layer
            _kept = {}
            _base = None  # (spec, {name: parameter}) of what an attached side took the place of
            loose = ()  # names of an attached side's tensors that the layer itself does not have
            rows = ()  # first out-channel of each attached Kronecker product

            def _begin(self, in_features, out_features, bias, dtype):
                self.in_features, self.out_features = in_features, out_features
                self._expected = ("weight", "bias") if bias else ("weight",)
                self.weight = self.bias = None
                self.float_dtype = dtype

            def _load_from_state_dict(
                self, state_dict, prefix, metadata, strict, missing, unexpected, errors
            ):
                if not self.pointwise:
                    super()._load_from_state_dict(
                        state_dict, prefix, metadata, strict, missing, unexpected, errors
                    )
                    return
                unexpected += [
                    k
                    for k in state_dict
                    if k.startswith(prefix) and k.removeprefix(prefix) not in self._expected
                ]
                layer = take(prefix.removesuffix("."))
                if layer is None:
                    self._load_float(state_dict, prefix, missing, errors)
                    return
                if layer.spec.logical_shape != self._shape:
                    by = lambda shape: " x ".join(map(str, shape))
                    errors.append(
                        f"{layer.name}: the model has {by(self._shape)}, the file "
                        f"{by(layer.spec.logical_shape)}"
                    )
                    return
                if "bias" in self._expected and not layer.spec.bias:
                    missing.append(f"{prefix}bias")
                prepared = prepare(layer)
                self.original = layer if prepared is not layer else None
                self.spec, layer = prepared.spec, prepared
                # The weight first, which `next(module.parameters())` gives to networks that ask for a dtype.
                for name in TENSOR_NAMES:
                    tensor = layer.tensors.get(name)
                    # register_parameter refuses names that are plain attributes already.
                    self.__dict__.pop(name, None)
                    self.register_parameter(
                        name, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
                    )
                self.weight = PackedWeight.of(self, layer.name, self.weight.data)
                self.weight_function = self.bias_function = []
                # ComfyUI after 0.33 computes layers under --fast fp16_accumulation itself, from real values,
                # unless they say this.
                self._full_precision_mm = True

            def _load_float(self, state_dict, prefix, missing, errors):
                for name in ("weight", "bias"):
                    tensor = state_dict.get(prefix + name)
                    if name not in self._expected:
                        continue
                    if tensor is None:
                        missing.append(prefix + name)
                        continue
                    shape = self._shape if name == "weight" else (self.out_features,)
                    if tuple(tensor.shape) != shape:
                        errors.append(
                            f"{prefix}{name}: the model has {list(shape)}, the file {list(tensor.shape)}"
                        )
                        continue
                    self.__dict__.pop(name, None)
                    self.register_parameter(
                        name,
                        torch.nn.Parameter(tensor.to(self.float_dtype or tensor.dtype), requires_grad=False),
                    )

            @property
            def _shape(self):
                return (self.out_features, self.in_features) + (1,) * self.spatial

            def real_weight(self, cast):
                """W (N, K, or what the model has) that the layer applies to x, with what is attached, in the
                dtype and on the device of `cast`."""
                tensors, stream = self._tensors_on(cast.device)
                weight = QuantizedLayer(
                    "", self.spec, {k: tensors[k] for k in TENSOR_NAMES if k in tensors}
                ).dequantize()
                for i, first in enumerate(self.rows):
                    term = torch.kron(
                        tensors[f"kronecker{i}_left"].float(), tensors[f"kronecker{i}_right"].float()
                    )
                    weight[first : first + len(term)] += term
                if DENSE in tensors:
                    weight += tensors[DENSE].float()
                if stream is not None:
                    stream.wait_stream(comfy.model_management.current_stream(cast.device))
                return weight.to(cast.dtype).view(self._shape)

            def real_bias(self, cast):
                """The bias that goes with `real_weight`: the model's own."""
                return self.convert_bias(cast).to(cast.dtype)

            def convert_weight(self, weight, inplace=False, **kwargs):
                """What ModelPatcher reads when this layer is merged into another model: real values."""
                return (
                    self.layer().to(weight.device).dequantize().view(self._shape)
                    if is_quantized(self)
                    else weight
                )

            def convert_bias(self, bias, inplace=False, **kwargs):
                """The model's own bias: the stored one also holds the correction for shifted activations."""
                correction = bias_correction(self.layer()) if is_quantized(self) else None
                return bias if correction is None else bias + correction.to(bias.device)

            def set_bias(self, bias, inplace_update=False, seed=None, return_weight=False, **kwargs):
                correction = bias_correction(self.layer()) if is_quantized(self) else None
                bias = (bias if correction is None else bias - correction.to(bias.device)).to(self.bias.dtype)
                return self._set("bias", bias, inplace_update, return_weight)

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                if is_quantized(self):
                    raise RequantizationError(
                        "a patch would overwrite a packed weight; adapters stand beside it instead"
                    )
                rounded = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
                return self._set("weight", rounded, inplace_update, return_weight)

            def _set(self, name, tensor, inplace_update, return_weight):
                if return_weight:
                    return tensor
                if inplace_update:
                    getattr(self, name).data.copy_(tensor)
                else:
                    setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))
                return None

            def layer(self, name="") -> QuantizedLayer:
                """The quantized layer as a record sharing this module's tensors, without what is attached to
                it."""
                held = {k: getattr(self, k, None) for k in TENSOR_NAMES} | (
                    self._base[1] if self._base else {}
                )
                spec = self._base[0] if self._base else self.spec
                return QuantizedLayer(
                    name, spec, {k: held[k].data for k in TENSOR_NAMES if held[k] is not None}
                )

            def attach(self, key, make_side: Callable[[], Side], dtype, keep=0):
                """Puts a side beside the packed weight, in the place of what was there; an empty key takes it
                off.

                Its tensors are parameters, so that ComfyUI counts and moves them with the layer; a merged
                low-rank branch takes the place of the layer's own, which waits in `_base`. keep: former sides
                to hold on to, by key.
                """
                former = (self.attached, self._detach())
                if keep and former[0]:
                    self._kept = {**self._kept, former[0]: former[1]}
                    while len(self._kept) > keep:
                        del self._kept[next(iter(self._kept))]
                elif not keep:
                    self._kept = {}
                if key:
                    made = self._kept.pop(key, None) or self._made(make_side(), dtype)
                    self._base = (
                        self.spec,
                        {k: getattr(self, k) for k in made.parameters if k in TENSOR_NAMES},
                    )
                    self.spec, self.rows = made.spec, made.rows
                    for name, parameter in made.parameters.items():
                        self.__dict__.pop(name, None)
                        self.register_parameter(name, parameter)
                    self.loose = tuple(k for k in made.parameters if k not in TENSOR_NAMES)
                self.attached = key

            def _made(self, side, dtype):
                layer, device = self.layer(), self.weight.device
                spec, tensors = side.merged(layer.to(side.device), dtype)
                for i, term in enumerate(side.kronecker):
                    tensors |= {
                        f"kronecker{i}_left": term.left.to(dtype),
                        f"kronecker{i}_right": term.right.to(dtype),
                    }
                if side.dense is not None:
                    tensors[DENSE] = side.dense.to(dtype)
                held = {
                    k: torch.nn.Parameter(t.to(device).contiguous(), requires_grad=False)
                    for k, t in tensors.items()
                }
                return Attached(spec, held, tuple(t.first for t in side.kronecker))

            def _detach(self):
                """Back to the layer as it was, with its own tensors. Returns what was attached."""
                if self._base is None:
                    return None
                spec, own = self._base
                former = Attached(self.spec, {k: getattr(self, k) for k in (*own, *self.loose)}, self.rows)
                for name in self.loose:
                    delattr(self, name)
                for name, parameter in own.items():
                    if (
                        parameter is not None and parameter.device != self.weight.device
                    ):  # the layer was moved in the meantime
                        parameter.data = parameter.data.to(self.weight.device)
                    self.register_parameter(name, parameter)
                self.spec, self._base, self.loose, self.rows = spec, None, (), ()
                return former

            def forward(self, x, *args, before=None, **kwargs):
                """before: a `kernels.before.Before` that the activation quantizer computes in the place of a
                module in front."""
                if not is_quantized(self):
                    return super().forward(x, *args, **kwargs)
                if not x.is_floating_point():
                    raise PackedWeightError(
                        f"{getattr(self.weight, 'layer_name', '')}: expected x in floats, found {x.dtype}, "
                        "the dtype of the packed weight. Cast x "
                        "to the model's dtype, not to that of a weight."
                    )
                if len(self.weight_function) > 1:
                    raise RequantizationError(
                        "a weight patch reached a packed layer, which only takes what ComfyUI's LoRA "
                        "loaders make"
                    )
                tensors, stream = self._tensors_on(x.device)
                functions = self.bias_function[1:]
                if functions:
                    tensors["bias"] = tensors["bias"].clone()  # they add in place
                for function in functions:
                    tensors["bias"] = function(tensors["bias"])
                if BIAS_OFFSET in tensors:
                    tensors["bias"] = tensors["bias"].float() + tensors[BIAS_OFFSET]
                x = channels_last(x, self.spatial)
                if before is not None and (self.rows or DENSE in tensors):
                    x, before = before(x), None
                y = quant_linear(
                    x, self.spec, {k: tensors[k] for k in TENSOR_NAMES if k in tensors}, before=before
                )
                for i, first in enumerate(self.rows):
                    term = kronecker(x, tensors[f"kronecker{i}_left"].mT, tensors[f"kronecker{i}_right"].mT)
                    y[..., first : first + term.shape[-1]] += term
                if DENSE in tensors:
                    y += torch.nn.functional.linear(x, tensors[DENSE].to(x.dtype))
                if stream is not None:
                    stream.wait_stream(comfy.model_management.current_stream(x.device))
                return channels_first(y, self.spatial)

            def _tensors_on(self, device):
                """({name: tensor on `device`}, the stream that copied or None). A layer left in memory is copied
                at each call, on a stream of its own, so that the copy runs beside the layer before it."""
                # No `:=` in here: torch.compile breaks the graph at it.
                held = {
                    k: getattr(self, k) for k in (*TENSOR_NAMES, *self.loose) if getattr(self, k) is not None
                }
                held["weight"] = self.weight.detach()  # the codes as they are
                if self.weight.device == device:
                    return {k: p if p.device == device else p.to(device) for k, p in held.items()}, None
                stream = comfy.model_management.get_offload_stream(device)
                fast = comfy.model_management.device_supports_non_blocking(device)
                moved = {
                    k: comfy.model_management.cast_to(p, None, device, non_blocking=fast, stream=stream)
                    for k, p in held.items()
                }
                comfy.model_management.sync_stream(device, stream)
                return moved, stream

            def __setattr__(self, name, value):
                if (
                    name == "forward"
                ):  # ComfyUI's bypass loaders put their own there, which must see the layer's real input
                    super().__setattr__("wrapped", getattr(value, "__func__", None) is not type(self).forward)
                elif name in FUNCTIONS and is_quantized(self):
                    value = RealValues.before(self, name, value)
                super().__setattr__(name, value)

        class Linear(Packable, comfy.ops.manual_cast.Linear):
            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                torch.nn.Module.__init__(self)
                self._begin(in_features, out_features, bias, dtype)

        class Convolution(Packable):
            def __init__(
                self, in_channels, out_channels, kernel_size, *args, device=None, dtype=None, **kwargs
            ):
                one = kernel_size in (1, (1,), (1, 1))
                super().__init__(
                    in_channels,
                    out_channels,
                    kernel_size,
                    *args,
                    device="meta" if one else device,
                    dtype=dtype,
                    **kwargs,
                )
                self.pointwise = one and is_pointwise(self)
                if self.pointwise:
                    self._begin(in_channels, out_channels, self.bias is not None, dtype)
                elif one:
                    self.to_empty(device=torch.get_default_device() if device is None else device)

        class Conv1d(Convolution, comfy.ops.manual_cast.Conv1d):
            spatial = 1

        class Conv2d(Convolution, comfy.ops.manual_cast.Conv2d):
            spatial = 2

    return NibbleOperations
