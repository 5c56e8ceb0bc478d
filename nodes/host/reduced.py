"""Tensors that ComfyUI, or the pack ComfyUI-GGUF, holds below 16 bit: which they are, and their real
values."""

from collections import Counter
from collections.abc import Mapping

import torch

from ...quant_core.formats.gguf_file import FLOATS, dequantized
from ...quant_core.formats.kitchen.declared import SOURCES, Declaration
from ...quant_core.formats.kitchen.dense import weight_of

PLAIN = ("F32", "F16")  # of ggml's types those that PyTorch has; its BF16 are bytes
FAKE = ".temp"  # behind the name of a layer: of a tensor by which ComfyUI-GGUF tells how much memory it takes


class Reduced:
    """Tensors below 16 bit in the modules of a network, {name: module}.

    kinds: {format: tensors in it}; shapes: {key: real shape}, of what is nowhere stored in that shape;
    layers: names of the modules that have any, whose state dict is not what they hold; of_another_pack: key
    of one that ComfyUI-GGUF holds, "" without any.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._declared = {n: d for n, module in modules.items() if (d := _declaration(module)) is not None}
        self._ggml = {
            f"{name}.{leaf}": held
            for name, module in modules.items()
            for leaf, held in module._parameters.items()
            if (kind := getattr(held, "tensor_type", None)) is not None and kind.name not in PLAIN
        }
        self._of_ggml = {key.rpartition(".")[0] for key in self._ggml}
        self.layers = {*self._declared, *self._of_ggml}
        self.of_another_pack = next(iter(self._ggml), "")
        self.shapes = {f"{name}.weight": tuple(modules[name].weight.shape) for name in self._declared}
        self.shapes |= {key: tuple(held.tensor_shape) for key, held in self._ggml.items()}
        types = (held.tensor_type.name for held in self._ggml.values())
        self.kinds = Counter(d.format for d in self._declared.values())
        self.kinds.update(kind for kind in types if kind not in FLOATS)

    def is_beside(self, key: str) -> bool:
        """Whether an entry of the network's state dict belongs to one of these and is no tensor of the
        model."""
        name, _, leaf = key.rpartition(".")
        of_declared = name in self._declared and leaf not in ("weight", "bias")
        return of_declared or (name.removesuffix(FAKE) in self._of_ggml and name.endswith(FAKE))

    def real(self, key: str, held: torch.Tensor) -> torch.Tensor:
        """The real values in bf16 of `held`, the tensor of a key of `shapes`, unpatched."""
        if key in self._ggml:
            of = self._ggml[key]
            return dequantized(
                plain(held).cpu().numpy(),
                of.tensor_type,
                of.tensor_shape,
                key,
            )
        name = key.removesuffix(".weight")
        # ComfyUI's own way to real values rounds the scale to bf16 first.
        smooth = getattr(self._modules[name], "pre_quant_scale", None)
        parts = held.state_dict("weight") | {"pre_quant_scale": smooth}
        return weight_of(self._declared[name], parts.get)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as PyTorch's own kind: ComfyUI-GGUF's does not copy itself."""
    return tensor.as_subclass(torch.Tensor) if hasattr(tensor, "tensor_type") else tensor


def _declaration(module) -> Declaration | None:
    """What a module of ComfyUI's own in fp8, nvfp4, mxfp8 or asym_w4a8_int8 is, None for others."""
    kind = getattr(module, "quant_format", None)
    if kind not in SOURCES:
        return None
    held = getattr(module.weight, "_params", None)
    rotation, group = getattr(held, "convrot_groupsize", 0), getattr(held, "group_size", 0)
    return Declaration(kind, rotation, group=group)
