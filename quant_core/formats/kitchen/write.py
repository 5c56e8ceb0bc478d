"""Quantized layers in comfy-kitchen's formats, and the file that declares them as ComfyUI does."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ....kernels.operator.codes import NVFP4
from ....kernels.operator.quantizers import GROUP
from ....kernels.operator.spec import GELU_SHIFT, ActivationSpec, LinearSpec, WeightSpec
from ...layer.linear import QuantizedLayer
from ...store.atomic import save_tensors
from ..origin import Origin, encoded
from ..zero_points import offsets_only, signed
from . import nvfp4
from .declared import HEADER, LEAF, ROTATIONS
from .read import PROVENANCE
from .stored import SIDE

_FOUR = (ActivationSpec(), ActivationSpec(unsigned=True, shift=GELU_SHIFT))


def format_of(
    spec: LinearSpec, layer: Callable[[], QuantizedLayer] | None = None, awq: bool = True
) -> tuple[dict, str]:
    """(the layer's JSON for comfy_quant, ""), or ({}, why no format of comfy-kitchen computes exactly what
    the layer does).

    layer(): the layer itself, for awq_w4a16, where its low rank may be no more than the zero points of its
    groups, and for nvfp4, where its rows may have one scale; None: the spec alone says what it is, and not
    awq_w4a16. awq: whether that format is there.
    """
    part = spec.parts[0]
    if len(spec.parts) > 1:
        return (
            {},
            f"{len(spec.parts)} ranges of in-channels with quantizers of their own; comfy-kitchen's layers "
            "have one",
        )
    if spec.order:
        return {}, "an order of in-channels of its own"
    if spec.spatial:
        return {}, "the weight of a 1x1 convolution; ComfyUI has quantized linear layers alone"
    if spec.padding:
        return (
            {},
            f"in-channels padded from {spec.in_features} to {spec.width}; comfy-kitchen's layers take x as "
            "it is",
        )
    if part.grid == NVFP4:
        return _nvfp4(spec, layer)
    if part.activation is not None and part.activation.grid == NVFP4:
        return {}, "4-bit floating-point activations (nvfp4) and integer weights; ComfyUI has no such layer"
    if part.kronecker:
        return {}, "a learned transform"
    if part.principal:
        return {}, "principal components, which its low rank takes out of x"
    if part.rank or part.smooth or part.weight == WeightSpec():
        return (
            _awq(spec, part, layer)
            if layer is not None and awq and part.activation is None
            else _svdquant(spec, part)
        )
    return _rowwise(part)


def _nvfp4(spec, layer):
    if reason := nvfp4.refused(spec):
        return {}, reason
    if layer is not None and nvfp4.one_scale(layer()) is None:
        return {}, "nvfp4 weights with scales of rows of their own; ComfyUI's have one of the tensor"
    return {"format": "nvfp4"} | _whole(spec.parts[0].activation), ""


def _whole(activation):
    """What says that x stays in 16 bit."""
    return {"full_precision_matrix_mult": True} if activation is None else {}


def _awq(spec, part, layer):
    if part.weight != WeightSpec() or part.smooth or part.rotation:
        return (
            {},
            "16-bit activations, and smoothing, a rotation or other weights than 4 bits in groups; "
            "awq_w4a16 has none of that",
        )
    if part.rank and awq_zeros(layer()) is None:
        return {}, f"4-bit weights for 16-bit activations with a low rank of {part.rank}; awq_w4a16 has none"
    return {"format": "awq_w4a16", "group_size": GROUP}, ""


def awq_zeros(layer: QuantizedLayer) -> torch.Tensor | None:
    """weight_zeros (K / 64, N) of a weight-only layer in groups: W = (code - 8) scale + zero. None where its
    low rank is more than that."""
    scale, up = layer.tensors["weight_scale"], layer.tensors.get("proj_up")
    if up is None:
        return torch.zeros_like(scale)
    return up.T.contiguous() if up.shape[1] == len(scale) and offsets_only(layer) else None


def _svdquant(spec, part):
    if part.weight != WeightSpec():
        return (
            {},
            f"a low rank or smoothing with weights of {part.weight.bits} bits per "
            f"{part.weight.granularity}; svdquant_w4a4 has groups of {GROUP} at 4 bits",
        )
    if part.rotation:
        return {}, f"a rotation of {part.rotation} channels; svdquant_w4a4 has none"
    if part.activation is None:
        return {}, "4-bit weights in groups for 16-bit activations; comfy-kitchen's awq_w4a16 has other codes"
    if part.activation not in _FOUR:
        return (
            {},
            f"{_activation(part.activation)}; svdquant_w4a4 has 4-bit ones in groups of {GROUP}, signed or "
            f"shifted by {GELU_SHIFT} and unsigned",
        )
    return {"format": "svdquant_w4a4"} | ({"act_unsigned": True} if part.activation.unsigned else {}), ""


def _rowwise(part):
    act, bits = part.activation, part.weight.bits
    if bits not in (4, 8):
        return {}, f"weights of {bits} bits; ComfyUI has 4 and 8"
    if part.weight.granularity == "group" or (bits == 4 and part.weight.granularity == "tensor"):
        return {}, f"{bits}-bit weights with a scale a {part.weight.granularity}; ComfyUI has one a row"
    if part.rotation not in (ROTATIONS if bits == 4 else (0, *ROTATIONS)):
        have = f"a rotation of {part.rotation} channels" if part.rotation else "no rotation"
        return {}, f"{have}; {'convrot_w4a4' if bits == 4 else 'int8_tensorwise'} takes 16, 64 or 256"
    if act is not None and act not in [ActivationSpec(b, "token") for b in ((4, 8) if bits == 4 else (8,))]:
        return {}, f"{_activation(act)}; ComfyUI has {'4' if bits == 4 else '8'}-bit signed ones per token"
    whole, size = _whole(act), {"convrot_groupsize": part.rotation}
    if bits == 4:  # with int8, cards quantize x to 8 bits; on the CPU comfy-kitchen takes 4 all the same
        return {"format": "convrot_w4a4"} | size | (
            {"linear_dtype": "int8"} if act is not None and act.bits == 8 else {}
        ) | whole, ""
    return {"format": "int8_tensorwise"} | ({"convrot": True} | size if part.rotation else {}) | whole, ""


def _activation(act):
    words = [f"{act.bits}-bit", "unsigned" if act.unsigned else "signed", "activations per", act.granularity]
    words += [f"clipped at {act.clip:g} of absmax"] * (act.clip != 1) + [f"shifted by {act.shift:g}"] * bool(
        act.shift
    )
    return " ".join(words)


def losses(
    specs: dict[str, LinearSpec], layer: Callable[[str], QuantizedLayer] | None = None, awq: bool = True
) -> dict[str, str]:
    """{layer: sentence} of the layers that no format of comfy-kitchen holds exactly: what `replace.replaced`
    is for. layer(name), awq: as in `format_of`."""
    found = {name: format_of(spec, layer and partial(layer, name), awq) for name, spec in specs.items()}
    return {name: f"has {reason}" for name, (_, reason) in found.items() if reason}


def save(
    path,
    layers: dict[str, QuantizedLayer],
    rest: dict[str, torch.Tensor],
    metadata: dict,
    origin: Origin | None = None,
    awq: bool = False,
):
    """Writes svdquant_w4a4, convrot_w4a4, int8_tensorwise and nvfp4 layers, in natural layout under
    comfy-kitchen's names, and the rest.

    Stock ComfyUI 0.33 loads the last three formats only (see `native`). awq: awq_w4a16 layers as well.
    metadata: JSON of where the model comes from, with "provenance" and "report" as in the pack's own file.
    origin: its header entries and tensors stand where ComfyUI's detection looks for them. Raises ValueError
    naming a layer that has no such format.
    """
    conf = {}
    for name, layer in layers.items():
        conf[name], reason = format_of(layer.spec, partial(layers.__getitem__, name), awq)
        if reason:
            raise ValueError(
                f"layer {name}: it has {reason}. Write it in 8 or 16 bit, or save the model in the pack's "
                "own format."
            )
    tensors = {
        f"{name}.{leaf}": t
        for name, layer in layers.items()
        for leaf, t in _stored(layer, conf[name]).items()
    }
    origin = origin or Origin()
    tensors |= origin.beside
    if both := set(tensors) & set(rest):
        raise ValueError(f"tensors given twice, as part of a quantized layer and apart: {sorted(both)[:3]}")
    header = {
        **origin.metadata,
        "format": "pt",
        HEADER: json.dumps({"format_version": "1.0", "layers": conf}),
        PROVENANCE: json.dumps(
            {"version": 1} | metadata | ({"host": encoded(origin.host)} if origin.host else {})
        ),
    }
    save_tensors(Path(path), {k: t.detach().cpu().contiguous() for k, t in (tensors | rest).items()}, header)


def _stored(layer, conf):
    t = layer.tensors
    if conf["format"] == "nvfp4":
        bias = {"bias": t["bias"]} if layer.spec.bias else {}
        return nvfp4.stored_of(layer) | bias | _marker(conf)
    out = {"weight": t["weight"]} | ({"bias": t["bias"]} if layer.spec.bias else {})
    if conf["format"] == "svdquant_w4a4":
        out |= {"weight_scale": t["weight_scale"]} | {
            f"weight_{leaf}": t[leaf] if leaf in t else _neutral(layer, leaf) for leaf in SIDE
        }
    elif conf["format"] == "awq_w4a16":
        out |= {
            "weight": signed(t["weight"]),
            "weight_scale": t["weight_scale"],
            "weight_zeros": awq_zeros(layer),
        }
    else:
        tensor, rows = layer.spec.parts[0].weight.granularity == "tensor", t["weight_scale"][0]
        # The shapes that comfy-kitchen's own quantizers give.
        out["weight_scale"] = (
            rows[0] if tensor else rows if conf["format"] == "convrot_w4a4" else rows[:, None]
        )
    return out | _marker(conf)


def _marker(conf):
    return {LEAF: torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)}


def _neutral(layer, leaf):
    """The tensor of a layer without smoothing or low rank: comfy-kitchen's asks for all of them."""
    spec, dtype = layer.spec, layer.tensors["weight_scale"].dtype
    if leaf == "smooth_factor":
        return torch.ones(spec.in_features, dtype=dtype)
    return torch.zeros(spec.in_features if leaf == "proj_down" else spec.out_features, 16, dtype=dtype)
