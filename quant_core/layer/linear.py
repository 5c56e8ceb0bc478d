"""A quantized layer as a record, and as an nn.Module."""

from dataclasses import dataclass, replace

import torch

from ...kernels.dispatch import quant_linear
from ...kernels.operator.codes import NVFP4
from ...kernels.operator.quantizers import dequantize
from ...kernels.operator.spec import TENSOR_NAMES, LinearSpec, SpecError
from ...kernels.operator.transforms import channels_first, channels_last, to_transformed, unfold_weight

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantizedLayer:
    """A LinearSpec and its tensors. Raises SpecError, naming `name`, where the two do not fit."""

    name: str
    spec: LinearSpec
    tensors: dict[str, torch.Tensor]

    def __post_init__(self):
        wanted = self.spec.shapes()
        if set(wanted) != set(self.tensors):
            raise SpecError(
                f"layer {self.name}: its description asks for the tensors {sorted(wanted)}, found "
                f"{sorted(self.tensors)}"
            )
        whole = {"weight": torch.int8, "channel_order": torch.int32, "outer_scale": torch.float32}
        if self.spec.parts[0].weight.grid == NVFP4:
            whole["weight_scale"] = torch.float8_e4m3fn
        for key, shape in wanted.items():
            tensor = self.tensors[key]
            if tuple(tensor.shape) != shape:
                raise SpecError(
                    f"layer {self.name}: {key} should have the shape {shape}, found {tuple(tensor.shape)}"
                )
            if tensor.dtype not in ((whole[key],) if key in whole else _FLOATS):
                raise SpecError(f"layer {self.name}: {key} has the dtype {tensor.dtype}")
            if (
                key == "channel_order"
                and tensor.is_cpu
                and not torch.equal(tensor.sort().values, torch.arange(len(tensor)).int())
            ):
                # On the CPU, as it comes from a file: on a card an index out of range would end the process.
                raise SpecError(
                    f"layer {self.name}: channel_order is no permutation of 0 to {len(tensor) - 1}"
                )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """All side data counted: scales, smoothing, low rank, bias."""
        return 8 * self.nbytes / (self.spec.in_features * self.spec.out_features)

    def to(self, device) -> "QuantizedLayer":
        return QuantizedLayer(self.name, self.spec, {k: t.to(device) for k, t in self.tensors.items()})

    def in_memory(self) -> "QuantizedLayer":
        """A copy: files that it was memory-mapped from may go, and its tensors lie as PyTorch aligns its
        own."""
        return QuantizedLayer(self.name, self.spec, {k: t.clone() for k, t in self.tensors.items()})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return quant_linear(x, self.spec, self.tensors)

    def dequantize(self) -> torch.Tensor:
        """The weight (N, K) that the layer effectively applies to the raw x, low rank included, fp32."""
        out = []
        parts = zip(self.spec.split(self.tensors), self.spec.factors(self.tensors), strict=True)
        for i, ((part, packed, scales, smooth), factors) in enumerate(parts):
            grain = "group" if part.scale_rows > 1 else "channel"
            folded = dequantize(part.weight.unpack(packed), scales.float().T, grain, part.weight.group)
            if part.principal:  # what the components took out of Tx does not meet these codes
                down = self.tensors["proj_down"][part.start : part.stop, : part.principal]
                v = to_transformed(down, smooth, part.rotation)
                folded = folded - (folded @ v) @ v.T
            weight = unfold_weight(folded, smooth, part.rotation, factors)
            if part.rank:
                up = self.tensors["proj_up"][:, i * part.rank : (i + 1) * part.rank].float()
                weight += up @ self.tensors["proj_down"][part.start : part.stop].float().T
            out.append(weight)
        whole = torch.cat(out, 1)
        if self.spec.order:
            whole = torch.empty_like(whole).index_copy_(1, self.tensors["channel_order"].long(), whole)
        return whole[:, : self.spec.in_features].contiguous() if self.spec.padding else whole

    def split_rows(self, names: list[str], sizes: list[int]) -> list["QuantizedLayer"]:
        """The layer cut by out-channels, as for a model that keeps q, k and v apart. In-channel tensors are
        shared."""
        whole = ("smooth_factor", "proj_down", "transform", "channel_order")
        cuts = {k: t.split(sizes, self.spec.row_axis(k)) for k, t in self.tensors.items() if k not in whole}
        shared = {k: t for k, t in self.tensors.items() if k not in cuts}
        return [
            QuantizedLayer(
                name,
                replace(self.spec, out_features=size),
                shared | {k: c[i].contiguous() for k, c in cuts.items()},
            )
            for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits, by which a NaN is itself and zeros
    have a sign."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


class QuantLinear(torch.nn.Module):
    """Drop-in for nn.Linear: holds a QuantizedLayer's tensors under their own names. x (..., K) -> (..., N);
    of a 1x1 convolution (..., K, L) or (..., K, H, W), as nn.Conv1d and nn.Conv2d take it."""

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self.spec = layer.spec
        self.in_features, self.out_features = layer.spec.in_features, layer.spec.out_features
        for key in TENSOR_NAMES:
            tensor = layer.tensors.get(key)
            self.register_parameter(
                key, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            )

    def forward(self, x):
        tensors = {k: getattr(self, k) for k in TENSOR_NAMES}
        y = quant_linear(
            channels_last(x, self.spec.spatial),
            self.spec,
            {k: p for k, p in tensors.items() if p is not None},
        )
        return channels_first(y, self.spec.spatial)
