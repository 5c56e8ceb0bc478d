"""Layers that a format cannot hold, in 8 or 16 bit instead."""

from collections.abc import Iterable

import torch

from ...kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from ..families import Layer, Part
from ..formats.kitchen.declared import INT8_CHANNELS, ROTATIONS
from ..layer.adapters import bias_correction
from ..layer.assemble import FittedPart, assemble, round_part
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem
from ..methods import weight_only

AS = ("int8", "16 bit")
NEAREST = "W4A16 rounded to nearest"
SMALL = "awq"  # for a target that has awq_w4a16: NEAREST what is weight-only, int8 the rest


def dense(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight (N, K) that the layer applies to x, bias (N,) or None), fp32. The bias without what corrects
    shifted activations."""
    bias = layer.tensors["bias"].float() if layer.spec.bias else None
    if bias is not None and (correction := bias_correction(layer)) is not None:
        bias = bias + correction
    return layer.dequantize(), bias


def int8(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer as int8_tensorwise with a rotation: its dequantized weight at 8 bits a row, x at 8 bits a
    token.

    Its values are rounded once more, at about 40 dB. x has 8 bits, but no groups and no smoothing: under
    outliers that is about as good. A weight-only layer stays one.
    """
    weight, bias = dense(layer)
    k = weight.shape[1]
    size = next((s for s in ROTATIONS if k % s == 0), 0)
    activation = None if layer.spec.weight_only else ActivationSpec(8, "token")
    spec = PartSpec(0, k, WeightSpec(8, "channel"), activation, rotation=size)
    codes, scales = round_part(weight, spec, None, torch.float32)
    return assemble(
        _problem(layer.name, weight, bias),
        [FittedPart(spec, codes, scales)],
    )


def nearest_spec(spec: LinearSpec) -> LinearSpec:
    """Of `nearest`."""
    part = PartSpec(0, spec.width, WeightSpec(), None)
    return LinearSpec(
        spec.in_features, spec.out_features, (part,), spec.bias, padding=spec.padding, spatial=spec.spatial
    )


def nearest(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer as W4A16 in groups of 64 without a low rank, its values rounded once more with the clip of
    least squares."""
    weight, bias = dense(layer)
    made = weight_only.fit(_problem(layer.name, weight.to(_half(layer)), bias).filled()).layer
    assert made is not None  # rounding to nearest takes any layer
    return made


def becomes(spec: LinearSpec, what: str) -> str:
    """What of NEAREST and AS a layer really becomes where one of them, or SMALL, was asked for."""
    if what == SMALL:
        what = NEAREST if spec.weight_only and not spec.padding else "int8"
    return "16 bit" if what == "int8" and (spec.spatial or spec.in_features % INT8_CHANNELS) else what


def _half(layer) -> torch.dtype:
    """fp16 where the layer's own tensors are, else bf16."""
    return torch.float16 if any(t.dtype == torch.float16 for t in layer.tensors.values()) else torch.bfloat16


def _problem(name, weight, bias):
    n, k = weight.shape
    return Problem(Layer(name, name, k, n, (Part(0, k),), name), weight, bias, None)


def replaced(
    layers: dict[str, QuantizedLayer], rest: dict[str, torch.Tensor], names: Iterable[str], what: str
) -> tuple[dict[str, QuantizedLayer], dict[str, torch.Tensor]]:
    """(layers, rest) with the layers `names` as what they become by `becomes`: `nearest`, `int8`, or plain
    weights and biases in `rest`, in bf16 (fp16 where the layer's own tensors are). Raises ValueError for
    another `what`."""
    if what not in (*AS, NEAREST, SMALL):
        raise ValueError(f"unknown replacement {what!r}; choose of {', '.join((*AS, SMALL))}")
    layers, rest = dict(layers), dict(rest)
    for name in names:
        if (now := becomes(layers[name].spec, what)) != "16 bit":
            layers[name] = (int8 if now == "int8" else nearest)(layers[name])
            continue
        layer = layers.pop(name)
        dtype, (weight, bias) = _half(layer), dense(layer)
        rest[f"{name}.weight"] = weight.to(dtype).view(layer.spec.logical_shape)
        if bias is not None:
            rest[f"{name}.bias"] = bias.to(dtype)
    return layers, rest
