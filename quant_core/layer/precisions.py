"""What a quantized layer can be raised to: 8-bit activations, 8-bit weights from the original, or 8 bits of
its own 4-bit values."""

from dataclasses import replace
from typing import cast

import torch

from ...kernels.operator.codes import INT
from ...kernels.operator.quantizers import absmax_scale, dequantize, quantize
from ...kernels.operator.spec import ActivationSpec, LinearSpec, WeightSpec
from .adapters import bias_correction
from .assemble import FittedPart, assemble, round_part
from .chunks import row_chunks
from .linear import QuantizedLayer
from .problem import Problem

PRECISIONS = ("W4A8", "W8A8", "16 bit")


def in_int8(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer with int8 codes and one scale a row (`LinearSpec.as_int8`), fp32 (parts, N), on the device of
    its tensors.

    For cards where group scales cost more than the product itself (sm_90), and for torch's int8 product.
    Codes with one scale a row keep their values exactly. Those with scales of groups are rounded once more,
    to 8 bits: noise of about 1 % of what 4 bits cost. Twice the memory of 4 bits in both cases.
    """
    codes, scales = [], []
    for part, packed, scale, _ in layer.spec.split(layer.tensors):
        values = part.weight.unpack(packed)
        if part.scale_rows == 1:
            codes.append(values.to(torch.int8))
            scales.append(scale.float())
            continue
        rounded, row_scale = torch.empty_like(values), scale.new_empty(len(values), 1, dtype=torch.float32)
        for rows in row_chunks(*values.shape, device=values.device):
            weight = dequantize(values[rows], scale.float().T[rows], "group", part.weight.group)
            row_scale[rows] = absmax_scale(weight, 8, "channel")
            rounded[rows] = quantize(weight, row_scale[rows], 8, "channel")
        codes.append(rounded)
        scales.append(row_scale.T)
    tensors = {k: t for k, t in layer.tensors.items() if k != "outer_scale"}
    tensors |= {"weight": torch.cat(codes, 1), "weight_scale": torch.cat(scales).contiguous()}
    eight = QuantizedLayer(layer.name, layer.spec.as_int8(), tensors)
    before, after = bias_correction(layer), bias_correction(eight)
    if before is not None and after is not None:  # what the bias holds of a shift goes with the weights
        tensors["bias"] = (tensors["bias"].float() + before - after).to(tensors["bias"].dtype)
    return eight


def w4a8(quantized: QuantizedLayer) -> QuantizedLayer:
    """The same tensors, shared, with signed 8-bit activation codes; granularity, shift, smoothing, rotation
    and low rank stay.

    A range that was clipped for 4 bits is not clipped at 8.
    """
    parts = tuple(
        replace(p, activation=replace(cast(ActivationSpec, p.activation), bits=8, unsigned=False, clip=1.0))
        for p in quantized.spec.parts
    )
    return QuantizedLayer(quantized.name, replace(quantized.spec, parts=parts), quantized.tensors)


def w8a8(problem: Problem, quantized: QuantizedLayer) -> QuantizedLayer:
    """The original weight at 8 bits, one fp32 scale a row, smoothed and rotated as the quantized layer is,
    without a learned transform; one scale a token; no low rank.

    Without the shift: it is there for unsigned codes, and signed ones are 0.2 dB better off without (41.75
    against 41.55 dB after a GELU). So the bias is the original one.
    """
    if problem.padding != quantized.spec.padding:  # stock ComfyUI's formats have none
        problem = problem.raw()
    parts, order = [], quantized.tensors.get("channel_order")
    weight = problem.weight if order is None else problem.weight.index_select(1, order)
    for part, _, _, smooth in quantized.spec.split(quantized.tensors):
        spec = replace(
            part,
            weight=WeightSpec(8, "channel"),
            activation=ActivationSpec(8, "token"),
            rank=0,
            kronecker=(),
            per_slice=False,
            principal=0,
        )
        # Rounded as `assemble` stores it, and only then folded.
        smooth = None if smooth is None else smooth.to(problem.dtype).float()
        codes, scales = round_part(weight[:, part.start : part.stop], spec, smooth, torch.float32)
        parts.append(FittedPart(spec, codes, scales, smooth))
    return assemble(problem, parts, order)


def higher(spec: LinearSpec) -> list[str]:
    """The PRECISIONS above what a layer has, cheapest first; [] for a weight-only layer."""
    if any(p.activation is None for p in spec.parts):
        return []
    weights = {p.weight.bits for p in spec.parts}
    activations = {p.activation.bits for p in spec.parts if p.activation is not None}
    # Nothing multiplies e2m1 values by int8.
    offered = ["W4A8"] if weights == {4} and min(activations) < 8 and spec.grid == INT else []
    offered += ["W8A8"] if min(weights) < 8 or min(activations) < 8 else []
    return [*offered, "16 bit"]
