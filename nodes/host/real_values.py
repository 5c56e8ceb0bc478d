"""What code gets that reads the weight of a packed layer itself, instead of calling the layer: real values,
or a refusal by name.

ComfyUI and other packs cast weights with `comfy.ops.cast_bias_weight(layer, x)`, which ends with the
functions in the layer's `weight_function` and `bias_function`; the first of each gives real values. Others
write `layer.weight.to(x.dtype)`.
"""

import weakref

import torch

FUNCTIONS = {
    "weight_function": "real_weight",
    "bias_function": "real_bias",
}  # ComfyUI's lists: the methods of our Linear


class PackedWeightError(RuntimeError):
    """Packed codes were about to be used as numbers."""


class RealValues:
    """The first function of one of FUNCTIONS: whatever the packed tensor was cast to, what comes out is the
    layer's real tensor there.

    It holds its layer weakly: a cycle would keep a dropped model in memory until the next garbage collection.
    """

    def __init__(self, layer: torch.nn.Module, name: str) -> None:
        self._layer, self._name = weakref.ref(layer), name

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return getattr(self._layer(), FUNCTIONS[self._name])(tensor)

    def __deepcopy__(self, memo):
        layer = self._layer()
        return RealValues(memo.get(id(layer), layer), self._name)

    @classmethod
    def in_front_of(cls, functions: list, layer: torch.nn.Module, name: str) -> list:
        """`functions` behind the one for this layer, as ComfyUI sets, extends and empties the list."""
        return [cls(layer, name), *(f for f in functions if not isinstance(f, cls))]


class PackedWeight(torch.nn.Parameter):
    """Packed codes of a layer, moved and copied as any parameter; cast to floats, they become the real values
    (N, K).

    `dtype` and `shape` are those of the float weight, since networks ask a layer for them: Hunyuan3D 2.1
    casts its text to `next(to_k.parameters()).dtype`. All else (`data`, `detach()`, `nbytes`, `numel()`, the
    state dict) is the codes'. Of a layer with shifted activations the weight alone is refused, because the
    stored bias, which the caller would add to it, also holds the correction for the shift.
    """

    layer_name, stands_for = "", None
    _layer = staticmethod(lambda: None)

    @classmethod
    def of(cls, layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> "PackedWeight":
        """The weight of `layer`, a module of our operations that the model knows as `name`."""
        made = cls(tensor, requires_grad=False)
        made.layer_name, made._layer = name, weakref.ref(layer)
        made.stands_for = layer.float_dtype or torch.get_default_dtype(), torch.Size(layer.spec.logical_shape)
        return made

    @property
    def dtype(self) -> torch.dtype:
        return self.stands_for[0] if self._for_networks() else super().dtype

    @property
    def shape(self) -> torch.Size:
        return self.stands_for[1] if self._for_networks() else super().shape

    def _for_networks(self) -> bool:
        """Not for torch.compile, which asks for them to make the codes' twin without values."""
        return self.stands_for is not None and torch._guards.TracingContext.try_get() is None

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = made = PackedWeight(self.detach().clone(), requires_grad=False)
            made.layer_name, made.stands_for = self.layer_name, self.stands_for
            if (layer := memo.get(id(self._layer()))) is not None:
                made._layer = weakref.ref(layer)
        return memo[id(self)]

    def to(self, *args: object, **kwargs: object) -> torch.Tensor:
        device, dtype = _asked_for(*args, *kwargs.values())
        if dtype is None or not dtype.is_floating_point:
            return super().to(*args, **kwargs)
        layer = self._layer()
        if layer is None or any(
            part.activation is not None and part.activation.shift for part in layer.spec.parts
        ):
            raise PackedWeightError(
                f"{self.layer_name or 'a quantized layer'}: something asked for its weight as {dtype} and "
                f"found packed codes ({self.data.dtype}, {tuple(self.data.shape)}), which do not stand "
                "alone. Call the layer, or take weight and bias together with "
                "comfy.ops.cast_bias_weight(layer, x)."
            )
        return layer.real_weight(torch.empty((), dtype=dtype, device=device or self.device))

    def type(
        self, dtype: torch.dtype | str | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor | str:
        return self.to(dtype) if isinstance(dtype, torch.dtype) else super().type(dtype, *args, **kwargs)

    def half(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.to(torch.float16)

    def bfloat16(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.to(torch.bfloat16)

    def float(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.to(torch.float32)

    def double(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.to(torch.float64)


def _asked_for(*arguments) -> tuple:
    """(device, dtype) among the arguments of `Tensor.to`, None for what is not there; they come in any of its
    three orders."""
    device = dtype = None
    for value in arguments:
        if isinstance(value, torch.Tensor):
            return value.device, value.dtype
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool):
            device = torch.device(value)
    return device, dtype
