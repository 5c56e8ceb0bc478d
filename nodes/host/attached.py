"""What adapters put beside a packed layer, as parameters of its module."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from ...kernels.operator.spec import TENSOR_NAMES, LinearSpec
from ...quant_core.layer.adapters import Side
from ...quant_core.layer.linear import QuantizedLayer

# Tensors of a side beside those of TENSOR_NAMES and the Kronecker factors.
BIAS_OFFSET, DENSE = "bias_offset", "dense"


@dataclass(frozen=True)
class SideParameters:
    """A side as parameters of a layer: `spec` with its low rank in, tensors by name, first out-channel of
    each Kronecker product."""

    spec: LinearSpec
    parameters: dict[str, torch.nn.Parameter | None]
    rows: tuple[int, ...]

    @classmethod
    def of(
        cls, side: Side, layer: QuantizedLayer, dtype: torch.dtype, device: torch.device | str
    ) -> "SideParameters":
        """`side` in `dtype` on `device`; the layer's own low rank, and what a gain scales, are merged into
        it."""
        spec, tensors = side.merged(layer.to(side.device), dtype)
        for i, term in enumerate(side.kronecker):
            left, right = factor_names(i)
            tensors |= {left: term.left.to(dtype), right: term.right.to(dtype)}
        if side.dense is not None:
            tensors[DENSE] = side.dense.to(dtype)
        parameters = {
            name: torch.nn.Parameter(t.to(device).contiguous(), requires_grad=False)
            for name, t in tensors.items()
        }
        return cls(spec, parameters, tuple(term.first for term in side.kronecker))


@dataclass
class Attached:
    """What stands beside one packed layer, which is `alone` at first. The side's tensors are parameters of
    the module, so that ComfyUI counts and moves them with the layer.

    key: of the patches that the side was made of. rows: first out-channel of each of its Kronecker products.
    loose: names of its tensors that the layer itself does not have. own_spec, own: the layer's spec and
    parameters whose place it took, which wait here. former: sides of before to hold on to, by key.
    """

    key: Hashable = ()
    rows: tuple[int, ...] = ()
    loose: tuple[str, ...] = ()
    own_spec: LinearSpec | None = None
    own: dict[str, torch.nn.Parameter | None] = field(default_factory=dict)
    former: dict[Hashable, SideParameters] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether the layer is as in the file."""
        return self.own_spec is None

    def put(
        self, module: torch.nn.Module, key: Hashable, make: Callable[[], SideParameters], keep: int = 0
    ) -> None:
        """Puts a side beside the layer of `module`, in the place of what was there; an empty key only takes
        it off. keep: how many former sides to hold on to."""
        key_before, side_before = self.key, self._take_off(module)
        if not keep:
            self.former = {}
        elif side_before is not None:
            self.former = {**self.former, key_before: side_before}
            while len(self.former) > keep:
                del self.former[next(iter(self.former))]
        if key:
            self._put(module, self.former.pop(key, None) or make())
        self.key = key

    def _put(self, module: torch.nn.Module, side: SideParameters) -> None:
        self.own_spec = module.spec
        self.own = {name: getattr(module, name) for name in side.parameters if name in TENSOR_NAMES}
        module.spec, self.rows = side.spec, side.rows
        for name, parameter in side.parameters.items():
            set_parameter(module, name, parameter)
        self.loose = tuple(name for name in side.parameters if name not in TENSOR_NAMES)

    def _take_off(self, module: torch.nn.Module) -> SideParameters | None:
        """Back to the layer as it was, with its own tensors. Returns the side that was there."""
        if self.alone:
            return None
        names = (*self.own, *self.loose)
        side = SideParameters(module.spec, {name: getattr(module, name) for name in names}, self.rows)
        for name in self.loose:
            delattr(module, name)
        for name, parameter in self.own.items():
            # The layer may have been moved in the meantime.
            if parameter is not None and parameter.device != module.weight.device:
                parameter.data = parameter.data.to(module.weight.device)
            module.register_parameter(name, parameter)
        module.spec = self.own_spec
        self.key, self.rows, self.loose, self.own_spec, self.own = (), (), (), None, {}
        return side


def factor_names(i: int) -> tuple[str, str]:
    """Of the parameters that hold the i-th Kronecker product."""
    return f"kronecker{i}_left", f"kronecker{i}_right"


def set_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
    """As `register_parameter`, which refuses names that are plain attributes already."""
    module.__dict__.pop(name, None)
    module.register_parameter(name, parameter)
