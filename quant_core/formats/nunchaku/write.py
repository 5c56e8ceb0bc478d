"""Writing nunchaku's files: one file with the header entries that nunchaku and ComfyUI-nunchaku read.

FLUX.1's files keep the C++ modules' names: the C++ loader knows no others, and the Python one renames them
itself, but turns `smooth_factor` into `smooth_factor_factor` (`convert_flux_state_dict`). All low-rank
branches get one rank: the Python modules are built with the header's.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import cast

import torch

from ....kernels.operator.spec import SpecError
from ...layer.linear import QuantizedLayer, same_bits
from ...layer.stack import resmooth, split_columns, stack_rows
from ...store.atomic import save_tensors
from ..zero_points import signed, zeros_of
from . import layout
from .config import configs
from .names import Module, Names, by_family
from .scales import stored
from .targets import Target, losses, stacks_of, targets_of
from .variants import variant_of


def save(
    path, layers: dict[str, QuantizedLayer], rest: dict[str, torch.Tensor], family: str, provenance: dict
) -> list[str]:
    """Writes a model as one nunchaku file under a temporary name and renames it. Returns sentences on what
    was changed on the way.

    layers, rest: under ComfyUI's names. Everything is stored in the layers' 16-bit dtype: biases with a
    correction for shifted activations or 1 added lose up to 2^-9 of themselves in bf16. Ranks are filled up
    with zeros to one multiple of 16. Raises SpecError where `losses` finds any, or the low rank of a
    modulation layer is no offset of groups; CheckpointError where `rest` lacks a tensor that the header's
    description of the model needs.
    """
    if lost := losses({name: layer.spec for name, layer in layers.items()}, family):
        name, why = next(iter(lost.items()))
        raise SpecError(
            f"{path}: {len(lost)} layers cannot be written for nunchaku, among them {name}: it {why}"
        )
    names = cast(Names, by_family(family))  # one that has none is among `losses`
    notes: list[str] = []
    tensors, rank, skipped = _tensors(names, layers, rest, notes)
    shapes = {key: tuple(t.shape) for key, t in rest.items()}
    shapes |= {f"{name}.weight": layer.spec.logical_shape for name, layer in layers.items()}
    quantization = variant_of([layer.spec for layer in layers.values()]).header(rank)
    if family == "z_image":
        quantization["skip_refiners"] = skipped
    header = {
        "model_class": names.model_class,
        "quantization_config": quantization,
        "provenance": provenance,
        **configs(family, shapes),
    }
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_tensors(Path(path), tensors, {"format": "pt"} | text)
    return notes


def _tensors(names: Names, layers, rest, notes: list[str]):
    """({stored key: tensor}, the rank of the low-rank branches, whether the blocks that nunchaku may leave in
    16 bits are). Adds to `notes` what is changed."""
    dtype = _dtype(layers)
    targets, _, loose = targets_of(names, {name: layer.spec for name, layer in layers.items()})
    plain = {key: tensor for name in loose for key, tensor in _in_16_bits(layers[name], dtype).items()}
    if loose:
        notes.append(
            f"{len(loose)} weight-only layers are stored in 16 bits, as nunchaku has them: "
            f"{', '.join(loose[:3])}"
        )
    tensors, skipped = _plain(names, rest | plain, {t.block for t in targets}, dtype, notes)
    linear: dict[Target, tuple] = {}
    errors: list[float] = []
    for target in targets:
        if target.module.splits:
            leaves = _modulation(layers[target.rows[0][0]], target.module, dtype, notes, errors)
            tensors |= {f"{target.name}.{leaf}": t for leaf, t in leaves.items()}
        else:
            joined = _joined(target, layers, notes)
            linear[target] = joined, _branch(joined)
    widest = max((down.shape[1] for _, (down, _) in linear.values()), default=0)
    rank = -(-widest // layout.RANK) * layout.RANK
    for target, (layer, branch) in linear.items():
        leaves = _linear(layer, branch, target.module, rank, dtype, errors)
        scales, change = stored(layer, dtype, partial(_short, layer.name, dtype=dtype))
        leaves |= scales
        notes += [
            f"{name}: scales of its out-channels are rounded to {dtype}, by at most {change:.2g} of "
            "themselves"
            for name, _, _ in target.rows
            if change
        ]
        tensors |= {f"{target.name}.{names.leaf(leaf)}": t for leaf, t in leaves.items()}
    if any(errors):
        notes.append(
            f"biases of {sum(map(bool, errors))} of nunchaku's modules are rounded to {dtype}, by at most "
            f"{max(errors):.2g}"
        )
    return tensors, rank, skipped


def reads_back(found: QuantizedLayer, layer: QuantizedLayer) -> bool:
    """Whether a layer read from a written file is the one given to `save`, but for what the format changes:
    low ranks filled up, smoothing by one where there is none, biases of 2^-8 of themselves (plus 1) less. Not
    for layers that `save` names in what it returns."""
    bias = [
        other.tensors["bias"].float() if other.spec.bias else torch.zeros(other.spec.out_features)
        for other in (found, layer)
    ]
    weight = [other.dequantize() for other in (found, layer)]
    for pair in (weight, bias):  # a NaN that was there stays one
        if pair[0].shape == pair[1].shape and torch.equal(pair[0].isfinite(), pair[1].isfinite()):
            pair[:] = [t.nan_to_num(0, 0, 0) for t in pair]
    return (
        (found.spec.in_features, found.spec.out_features) == (layer.spec.in_features, layer.spec.out_features)
        and all(same_bits(found.tensors[key], layer.tensors[key]) for key in ("weight", "weight_scale"))
        and bool((weight[0] - weight[1]).norm() <= 1e-6 * weight[1].norm())
        and bool(((bias[0] - bias[1]).abs() <= 2**-8 * (1 + bias[1].abs())).all())
    )


# -- tensors


def _dtype(layers) -> torch.dtype:
    """The 16-bit dtype of most layers' scales, of their branches and smoothings where scales have none."""
    short = lambda layer: (
        layer.tensors[key].dtype
        for key in ("weight_scale", "proj_up", "smooth_factor")
        if key in layer.tensors and layer.tensors[key].dtype.itemsize == 2
    )
    found = Counter(dtype for layer in layers.values() if (dtype := next(short(layer), None)))
    return found.most_common(1)[0][0] if found else torch.bfloat16


def _short(name, tensor, dtype):
    """`tensor` in `dtype`; SpecError where fp16 has no room for it."""
    short = tensor.to(dtype)
    if not short.isfinite().all() and tensor.isfinite().all():
        raise SpecError(f"{name}: values up to {tensor.abs().max():.3g} are too large for {dtype}")
    return short


def _in_16_bits(layer: QuantizedLayer, dtype):
    out = {f"{layer.name}.weight": _short(layer.name, layer.dequantize(), dtype)}
    return out | ({f"{layer.name}.bias": layer.tensors["bias"]} if layer.spec.bias else {})


def _plain(names: Names, rest, quantized, dtype, notes):
    """({stored key: tensor}, whether the blocks that nunchaku may leave in 16 bits are). quantized: blocks of
    targets."""
    stacks, left = stacks_of(names, list(rest)), []
    out: dict[str, torch.Tensor] = {}
    for key, tensor in rest.items():
        if key not in stacks and key.endswith("_norm.weight"):
            # FLUX's norms as ComfyUI holds them, and not as its files name them.
            key = key.removesuffix("weight") + "scale"
        if key not in stacks:
            left.append(key)
            continue
        keys = stacks[key].keys
        tensor = _short(key, tensor, dtype) if tensor.is_floating_point() else tensor
        swapped = stacks[key].swap_halves or len(keys) > 1
        out |= (
            stacks[key].write(tensor, [tensor.shape[0] // len(keys)] * len(keys))
            if swapped
            else {keys[0]: tensor}
        )
    if left:
        notes.append(
            f"{len(left)} tensors that the model does not have in nunchaku are left out: "
            f"{', '.join(left[:3])}"
        )
    skipped = {
        block
        for key in out
        if (found := names.block_of(key))
        for block in found[:1]
        if names.is_optional(block)
    } - quantized
    for block in dict.fromkeys(found[0] for key in out if (found := names.block_of(key))):
        for module in names.modules(block):
            for leaf in ("weight", "bias"):
                sources = [f"{block}.{source}.{leaf}" for source in module.sources]
                if (module.plain or (block in skipped and module.name in names.optional_renamed)) and all(
                    s in out for s in sources
                ):
                    tensors = [out.pop(s) for s in sources]
                    out[f"{names.stored(block, module)}.{leaf}"] = (
                        torch.cat(tensors) if len(tensors) > 1 else tensors[0]
                    )
    return out, bool(skipped)


def _joined(target: Target, layers, notes) -> QuantizedLayer:
    """The target as one layer of one part, named as it is stored."""
    pieces = []
    for name, start, stop in target.rows:
        layer = layers[name]
        if target.module.column >= 0:
            layer = split_columns(layer, [f"{name} columns {i}" for i in range(len(layer.spec.parts))])[
                target.module.column
            ]
        n = layer.spec.out_features
        cuts = [c for c in (start, stop - start, n - stop) if c]
        pieces.append(
            layer if len(cuts) == 1 else layer.split_rows([name] * len(cuts), cuts)[1 if start else 0]
        )
    first = pieces[0].tensors.get("smooth_factor")
    for i, piece in enumerate(pieces[1:], 1):
        if (
            first is not None
            and "smooth_factor" in piece.tensors
            and not torch.equal(first, piece.tensors["smooth_factor"])
        ):
            pieces[i], decibels = resmooth(piece, first)
            notes.append(
                f"{piece.name} takes the smoothing of {pieces[0].name}, quantized again at {decibels:.1f} "
                "dB of its weight"
            )
    if len(pieces) == 1:
        return QuantizedLayer(target.name, pieces[0].spec, pieces[0].tensors)
    downs = [p.tensors.get("proj_down") for p in pieces]
    share = all(d is not None and torch.equal(d, downs[0]) for d in downs) if downs[0] is not None else False
    return stack_rows(target.name, pieces, share)


def _branch(layer: QuantizedLayer):
    """(proj_down, proj_up) without the blocks of 16 ranks that have no part in it: rows of a stack carry the
    other rows' along."""
    if "proj_down" not in layer.tensors:
        k, n = layer.spec.in_features, layer.spec.out_features
        return torch.zeros(k, 0), torch.zeros(n, 0)
    down, up = layer.tensors["proj_down"], layer.tensors["proj_up"]
    blocks = [slice(at, at + layout.RANK) for at in range(0, layer.spec.rank, layout.RANK)]
    keep = [b for b in blocks if up[:, b].any()]
    return tuple(torch.cat([t[:, b] for b in keep], 1) if keep else t[:, :0] for t in (down, up))


def _rounded(name, bias, dtype, errors):
    """A bias in `dtype`; the largest change goes to `errors`."""
    short = _short(name, bias, dtype)
    errors.append((short.float() - bias.float()).abs().max().item())
    return short


def _linear(
    layer: QuantizedLayer, branch, module: Module, rank: int, dtype, errors
) -> dict[str, torch.Tensor]:
    """The stored tensors of a W4A4 module but for its scales, by their new leaves. branch: of `_branch`,
    filled up to `rank` with zeros."""
    tensors, n, k = layer.tensors, layer.spec.out_features, layer.spec.in_features
    short = lambda tensor: _short(layer.name, tensor, dtype)
    smooth = layout.pack_vector(
        short(tensors["smooth_factor"]) if "smooth_factor" in tensors else torch.ones(k, dtype=dtype)
    )
    out = {
        "qweight": layout.pack_weight(tensors["weight"]),
        "smooth_factor": smooth,
        "smooth_factor_orig": smooth.clone(),  # not read by any kernel, but asked for by the Python modules
    }
    if rank:
        down, up = (torch.nn.functional.pad(short(t), (0, rank - t.shape[1])) for t in branch)
        out |= {"proj_down": layout.pack_down(down), "proj_up": layout.pack_up(up)}
    if module.bias:
        bias = tensors["bias"] if "bias" in tensors else torch.zeros(n, dtype=dtype)
        out["bias"] = layout.pack_vector(_rounded(layer.name, bias, dtype, errors))
    return out


def _modulation(layer: QuantizedLayer, module: Module, dtype, notes, errors) -> dict[str, torch.Tensor]:
    """The stored tensors of a W4A16 modulation layer."""
    t, n = layer.tensors, layer.spec.out_features
    try:
        zero = zeros_of(t["weight_scale"], t.get("proj_down"), t.get("proj_up"), layout.GROUP)
    except ValueError as error:
        raise SpecError(
            f"layer {layer.name} cannot be written for nunchaku: {error}. Quantize it with rank 0."
        ) from error
    if not torch.equal(zero.to(dtype).float(), zero):
        notes.append(
            f"{layer.name}: zeros of its groups are rounded to {dtype}, which has no room for offset - 8 "
            "scale"
        )
    bias = t["bias"].float().clone() if layer.spec.bias else torch.zeros(n)
    bias.view(module.splits, -1)[layout.SCALES] += 1
    stored = lambda rows: layout.interleave(_short(layer.name, rows, dtype), module.splits)
    return {
        "qweight": layout.pack_awq(layout.interleave(signed(t["weight"]), module.splits)),
        "wscales": stored(t["weight_scale"].T).T,
        "wzeros": stored(zero).T,
        "bias": layout.interleave(_rounded(layer.name, bias, dtype, errors), module.splits),
    }
