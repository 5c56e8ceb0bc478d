"""Checkpoints in fp8, mxfp8 or GGUF as models that run: W8A8 behind a rotation.

This pack has no products of 8-bit floats or of ggml's blocks. int8 with a scale a row and a token, behind
Hadamard blocks of 256 channels, is 41 dB from a weight and from x whatever their values are; fp8's own
rounding of a weight is 31 dB from it, ggml's 20 to 45. Where a card has no fp8 products ComfyUI multiplies
dequantized weights by 16-bit x, and int8 products have twice that rate.
"""

from collections import Counter

import torch

from ...kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from ..layer.assemble import round_part
from ..layer.linear import QuantizedLayer
from .checkpoint import Checkpoint
from .kitchen.declared import ROTATIONS
from .opened import Opened


class ReducedFile(Opened):
    """A Checkpoint below 16 bit, whose layers in so few bits are rounded to int8 when they are asked for; all
    else is as the checkpoint has it."""

    def __init__(self, checkpoint: Checkpoint):
        self.path, self._checkpoint = checkpoint.path, checkpoint
        self.family, self.origin = checkpoint.family.name, checkpoint.origin
        self.kind = f"checkpoint below 16 bit ({checkpoint.reduced})"
        self.provenance, self.report = {}, []
        self.specs = {}
        for layer in checkpoint.family.layers(checkpoint.shapes):
            rotation = next((r for r in ROTATIONS if layer.in_features % r == 0), 0)
            if rotation and not layer.spatial and f"{layer.name}.weight" in checkpoint.below:
                part = PartSpec(
                    0,
                    layer.in_features,
                    WeightSpec(8, "channel"),
                    None if layer.weight_only else ActivationSpec(8, "token"),
                    rotation=rotation,
                )
                bias = f"{layer.name}.bias" in checkpoint.shapes
                self.specs[layer.name] = LinearSpec(
                    layer.in_features,
                    layer.out_features,
                    (part,),
                    bias,
                )
        taken = {f"{name}.{leaf}" for name in self.specs for leaf in ("weight", "bias")}
        self.rest = sorted(set(checkpoint.shapes) - taken)

    @property
    def files(self):
        return self._checkpoint.files

    @property
    def inputs(self):
        return self._checkpoint.inputs

    @property
    def notes(self) -> tuple[str, ...]:
        counts = Counter(spec.precision for spec in self.specs.values())
        held = ", ".join(f"{count} as {precision}" for precision, count in counts.most_common())
        return (
            f"layers in {self._checkpoint.reduced} are rounded to int8 behind a rotation ({held}), which is "
            "41 dB from what they are. Save or convert the model once: rounding takes time at each load",
        )

    def layer(self, name: str) -> QuantizedLayer:
        spec = self.specs[name]
        weight = self._checkpoint.get(f"{name}.weight")
        codes, scales = round_part(
            weight,
            spec.parts[0],
            None,
            torch.float32,
        )
        tensors = {
            "weight": codes,
            "weight_scale": scales.T.contiguous(),
        }
        if spec.bias:
            tensors["bias"] = self._checkpoint.get(f"{name}.bias")
        return QuantizedLayer(name, spec, tensors)

    def tensor(self, key: str) -> torch.Tensor:
        return self._checkpoint.get(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.shapes[key]
