"""Quantized layers put together to one: by out-channels (rows), by in-channels (columns). Exact but where a
smoothing is replaced."""

from dataclasses import replace
from typing import cast

import torch

from ...kernels.operator.codes import NVFP4
from ...kernels.operator.quantizers import best_clip_scale, dequantize
from ...kernels.operator.spec import LinearSpec, PartSpec, SpecError
from ...kernels.operator.transforms import fold_weight, unfold_weight
from .assemble import scale_tensors
from .chunks import power_db, row_chunks
from .linear import QuantizedLayer


def rows_spec(name: str, specs: list[LinearSpec], share: bool = False) -> LinearSpec:
    """The spec of `stack_rows`. share: all have one proj_down, which is kept once; else the ranks add up.

    Raises SpecError where the layers differ in anything but out-channels, rank and bias.
    """
    first = specs[0]
    for spec in specs[1:]:
        differs = [
            f for f in ("in_features", "order", "padding", "spatial") if getattr(spec, f) != getattr(first, f)
        ]
        if (
            differs
            or [_unranked(p) for p in spec.parts] != [_unranked(p) for p in first.parts]
            or (not share and any(p.principal for p in spec.parts))  # each takes other components out of x
        ):
            raise SpecError(
                f"layer {name}: rows of layers that read x in different ways cannot be one layer: "
                f"{first.describe()} of "
                f"{first.in_features} channels and {spec.describe()} of {spec.in_features}"
            )
    rank = first.rank if share else sum(s.rank for s in specs)
    parts = tuple(replace(p, rank=rank) for p in first.parts)
    return replace(
        first, out_features=sum(s.out_features for s in specs), parts=parts, bias=any(s.bias for s in specs)
    )


def columns_spec(name: str, specs: list[LinearSpec]) -> LinearSpec:
    """The spec of `stack_columns`: the parts behind each other, all with the largest rank. Raises
    SpecError."""
    rank, parts, at = max(s.rank for s in specs), [], 0
    for spec in specs:
        if spec.out_features != specs[0].out_features or spec.order or spec.padding:
            raise SpecError(
                f"layer {name}: columns of one layer need equally many out-channels and no order or "
                "padding of their own, found "
                f"{specs[0].out_features} and "
                f"{spec.out_features}{' with an order' * spec.order}{' with padding' * bool(spec.padding)}"
            )
        parts += [replace(p, start=at + p.start, stop=at + p.stop, rank=rank) for p in spec.parts]
        at += spec.in_features
    return LinearSpec(at, specs[0].out_features, tuple(parts), any(s.bias for s in specs))


def stack_rows(name: str, layers: list[QuantizedLayer], share: bool = False) -> QuantizedLayer:
    """y of all layers side by side, for one x. Low ranks stand side by side: proj_down (K, R1 + R2), proj_up
    block-diagonal.

    share: for layers that all have the first one's proj_down, as `split_rows` leaves them: it is kept once.
    Raises SpecError where smoothing, learned transform, order or quantizers differ, or the low ranks are said
    to be shared and are not.
    """
    spec = rows_spec(name, [layer.spec for layer in layers], share)
    one = ("smooth_factor", "transform", "channel_order") + (("proj_down",) if share else ())
    for key in one:
        if not all(_same(layers[0].tensors.get(key), layer.tensors.get(key)) for layer in layers[1:]):
            raise SpecError(
                f"layer {name}: the rows of {', '.join(layer.name for layer in layers)} differ in {key}"
            )
    tensors = {key: layers[0].tensors[key] for key in one if key in layers[0].tensors}
    tensors["weight"] = _cat(name, "weight", layers)
    for key in ("weight_scale", "outer_scale"):
        if key in layers[0].tensors:
            tensors[key] = _cat(name, key, layers, spec.row_axis(key))
    if spec.rank and share:
        tensors["proj_up"] = _cat(name, "proj_up", layers)
    elif spec.rank:
        ranked = [layer for layer in layers if layer.spec.rank]
        tensors["proj_down"] = _cat(name, "proj_down", ranked, 1)
        up = ranked[0].tensors["proj_up"].new_zeros(spec.out_features, len(spec.parts), spec.rank)
        row = column = 0
        for layer in layers:
            n, rank = layer.spec.out_features, layer.spec.rank
            if rank:
                up[row : row + n, :, column : column + rank] = layer.tensors["proj_up"].unflatten(
                    1, (-1, rank)
                )
            row, column = row + n, column + rank
        tensors["proj_up"] = up.flatten(1)
    if spec.bias:
        tensors["bias"] = torch.cat([_bias(layer, layers) for layer in layers])
    return QuantizedLayer(name, spec, tensors)


def stack_columns(name: str, layers: list[QuantizedLayer]) -> QuantizedLayer:
    """The sum of the layers' y, each of its own range of in-channels: parts of one layer. Low ranks are
    filled up with zero columns to the largest, biases add up, in fp32 where their own dtype would round the
    sum. Raises SpecError."""
    spec = columns_spec(name, [layer.spec for layer in layers])
    tensors = {"weight": _cat(name, "weight", layers, 1)}
    tensors |= {
        key: _cat(name, key, layers, 1 - spec.row_axis(key))
        for key in ("weight_scale", "outer_scale")
        if key in layers[0].tensors
    }
    if any("smooth_factor" in layer.tensors for layer in layers):
        like = next(layer.tensors["smooth_factor"] for layer in layers if "smooth_factor" in layer.tensors)
        tensors["smooth_factor"] = torch.cat(
            [
                layer.tensors["smooth_factor"]
                if "smooth_factor" in layer.tensors
                else like.new_ones(layer.spec.in_features)
                for layer in layers
            ]
        )
    if any("transform" in layer.tensors for layer in layers):
        tensors["transform"] = _cat(
            name, "transform", [layer for layer in layers if "transform" in layer.tensors]
        )
    if spec.rank:
        filled = [_with_rank(layer, layers, spec.rank) for layer in layers]
        tensors["proj_down"] = torch.cat([down for down, _ in filled])
        tensors["proj_up"] = torch.cat([up for _, up in filled], 1)
    if spec.bias:
        tensors["bias"] = exact_sum([layer.tensors["bias"] for layer in layers if layer.spec.bias])
    return QuantizedLayer(name, spec, tensors)


def split_columns(layer: QuantizedLayer, names: list[str]) -> list[QuantizedLayer]:
    """The parts of a layer as layers of their own, whose sum it is; the last one has the whole bias. Raises
    SpecError for a layer with an order, padding or a learned transform, or not one part for each name."""
    spec = layer.spec
    if (
        spec.order
        or spec.padding
        or spec.spatial
        or any(p.kronecker for p in spec.parts)
        or len(spec.parts) != len(names)
    ):
        raise SpecError(
            f"layer {layer.name}: {len(names)} ranges of in-channels without order, padding or learned "
            f"transform, found {spec.describe()}"
        )
    out = []
    row = 0
    for i, (name, (part, codes, _, smooth)) in enumerate(zip(names, spec.split(layer.tensors), strict=True)):
        of_part = 1 - spec.row_axis("weight_scale"), row, part.scale_rows
        tensors = {
            "weight": codes.contiguous(),
            "weight_scale": layer.tensors["weight_scale"].narrow(*of_part).contiguous(),
        }
        row += part.scale_rows
        if "outer_scale" in layer.tensors:
            tensors["outer_scale"] = layer.tensors["outer_scale"][i : i + 1].contiguous()
        if smooth is not None:
            tensors["smooth_factor"] = smooth
        if spec.rank:
            tensors["proj_down"] = layer.tensors["proj_down"][part.start : part.stop]
            tensors["proj_up"] = layer.tensors["proj_up"][:, i * spec.rank : (i + 1) * spec.rank].contiguous()
        bias = spec.bias and i == len(names) - 1
        if bias:
            tensors["bias"] = layer.tensors["bias"]
        own = LinearSpec(part.width, spec.out_features, (replace(part, start=0, stop=part.width),), bias)
        out.append(QuantizedLayer(name, own, tensors))
    return out


def resmooth(layer: QuantizedLayer, smooth: torch.Tensor) -> tuple[QuantizedLayer, float]:
    """(the layer quantized again behind another smoothing (K,), dB of the weight that it applies over the
    error made).

    The codes and scales of least squared error of the smoothed weight; low rank and bias stay. A layer of one
    part that smooths, without order. Raises SpecError for others, and where the activations are shifted: the
    bias holds the correction for the old codes.
    """
    (part, *more), tensors = layer.spec.parts, dict(layer.tensors)
    if (
        more
        or layer.spec.order
        or not part.smooth
        or part.kronecker
        or part.activation is None
        or part.activation.shift
    ):
        raise SpecError(
            f"layer {layer.name}: only plain smoothed layers of one part take another smoothing, found "
            f"{layer.spec.describe()}"
        )
    grain, group, bits = part.weight.granularity, part.weight.group, part.weight.bits
    old, codes, scales = tensors["smooth_factor"].float(), [], []
    ((_, packed, held, _),) = layer.spec.split(tensors)
    error = energy = 0.0
    for rows in row_chunks(layer.spec.out_features, layer.spec.in_features):
        weight = unfold_weight(
            dequantize(part.weight.unpack(packed[rows]), held[:, rows].T.float(), grain, group),
            old,
            part.rotation,
        )
        new = fold_weight(weight, smooth.float(), part.rotation)
        if part.grid == NVFP4:
            scale = part.weight.scales(new)
        else:
            scale = best_clip_scale(new, bits, grain, group).to(held.dtype)
        codes.append(part.weight.codes(new, scale.float()))
        scales.append(scale)
        again = unfold_weight(
            dequantize(codes[-1], scale.float(), grain, group), smooth.float(), part.rotation
        )
        error += (again - weight).double().square().sum().item()
        if part.rank:
            weight = weight + tensors["proj_up"][rows].float() @ tensors["proj_down"].float().T
        energy += weight.double().square().sum().item()
    tensors |= {"weight": part.weight.pack(torch.cat(codes)), "smooth_factor": smooth}
    tensors |= scale_tensors([torch.cat(scales)], part.grid)
    return QuantizedLayer(layer.name, layer.spec, tensors), power_db(energy, error)


def exact_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Their sum in their own dtype where that is exact, else in fp32."""
    if len(tensors) == 1:
        return tensors[0]
    whole = cast(torch.Tensor, sum(t.float() for t in tensors))
    short = whole.to(tensors[0].dtype)
    return short if torch.equal(short.float(), whole) else whole


def _unranked(part: PartSpec) -> PartSpec:
    return replace(part, rank=part.principal)


def _same(a, b) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _cat(name, key, layers, dim=0) -> torch.Tensor:
    tensors = [layer.tensors[key] for layer in layers]
    if len({t.dtype for t in tensors}) > 1:
        raise SpecError(
            f"layer {name}: {key} has the dtypes {', '.join(sorted({str(t.dtype) for t in tensors}))}"
        )
    return torch.cat(tensors, dim)


def _bias(layer, layers) -> torch.Tensor:
    if layer.spec.bias:
        return layer.tensors["bias"]
    return next(other.tensors["bias"] for other in layers if other.spec.bias).new_zeros(
        layer.spec.out_features
    )


def _with_rank(layer, layers, rank):
    """(proj_down (K, rank), proj_up (N, P rank)), filled up with zero columns."""
    own, spec = layer.spec.rank, layer.spec
    if own == rank:
        return layer.tensors["proj_down"], layer.tensors["proj_up"]
    like = next(other.tensors["proj_down"] for other in layers if other.spec.rank)
    down = like.new_zeros(spec.in_features, rank)
    up = like.new_zeros(spec.out_features, len(spec.parts), rank)
    if own:
        down[:, :own] = layer.tensors["proj_down"]
        up[:, :, :own] = layer.tensors["proj_up"].unflatten(1, (-1, own))
    return down, up.flatten(1)
