"""ComfyUI's patches of a weight as what stands beside a packed layer (`quant_core.side`).

A patch is ModelPatcher's tuple (strength, value, strength_model, offset, function), applied in order as
`comfy.lora.calculate_weight` does. One at strength 0 is no more than its factor, a gain. LoRA, LoHa and LoKr
keep their structure; DoRA by out-channel is a gain and a LoRA; the rest (full differences, `set`, OFT, BOFT,
GLoRA, DoRA by in-channel) is a dense matrix of the layer's size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter import WeightAdapterBase
from comfy.weight_adapter.boft import BOFTAdapter
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from comfy.weight_adapter.oft import OFTAdapter

from ...quant_core.layer.adapters import Kronecker, LowRank, Side, hadamard_low_rank, kronecker_or_low_rank
from ...quant_core.layer.linear import QuantizedLayer

Shape = tuple[int, ...]
# ModelPatcher's: (strength, value, strength_model, offset, function).
Patch = tuple[float, object, float, tuple[int, int, int] | None, Callable | None]

NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "boft": "BOFT"}


class UnsupportedPatch(RuntimeError):
    """A patch that a quantized layer cannot take."""


@dataclass(frozen=True)
class Region:
    """The rows and columns of a weight (N, K) that a patch is for; ComfyUI's offset is (dimension, start,
    length)."""

    first: int
    rows: int
    column: int
    columns: int

    @classmethod
    def of(cls, offset: tuple[int, int, int] | None, out_features: int, in_features: int) -> "Region":
        first, rows, column, columns = 0, out_features, 0, in_features
        if offset is not None and offset[0] == 0:
            first, rows = offset[1:]
        elif offset is not None:
            column, columns = offset[1:]
        return cls(first, rows, column, columns)


def replaces(patch: Patch) -> bool:
    """Whether a patch takes the place of the weight, whatever its strength."""
    return isinstance(patch[1], tuple) and len(patch[1]) == 2 and patch[1][0] == "set"


def only_scales(patch: Patch) -> bool:
    """Whether a patch is no more than its factor, `strength_model`. ComfyUI looks at no value at strength 0:
    nodes that multiply layers hand on `(None,)`."""
    return not patch[0] and not replaces(patch)


def refused(patch: Patch, shape: Shape) -> str:
    """Why no packed tensor of a shape can take a patch, whichever model that was made for; "" if it can."""
    value = patch[1]
    if to := reshaped(value, wanted(patch, shape)):
        return f"a patch that reshapes the weight to {times(to)}"
    if isinstance(value, WeightAdapterBase) or only_scales(patch):
        return ""
    if isinstance(value, list):
        return "a merge with another model, which would be a second full-precision model beside this one,"
    if not isinstance(value, tuple):
        return f"a patch of the unknown kind {type(value).__name__}"
    kind, _ = _parts(value)
    if kind == "model_as_lora":
        return "another model as LoRA, which would be a second full-precision model beside this one,"
    return unusable(patch, shape) if kind in ("diff", "set") else f"a patch of the unknown kind {kind!r}"


def unusable(patch: Patch, shape: Shape) -> str:
    """Why ComfyUI itself would stop at a patch of a tensor of a shape, when it loads the model and not
    before; "" if it would not."""
    value, want = patch[1], wanted(patch, shape)
    to = reshaped(value, want)
    if to and not (len(to) == len(want) and all(a >= b for a, b in zip(to, want, strict=True))):
        return f"a patch that reshapes the weight to {times(to)}, which has {times(want)},"
    if isinstance(value, tuple) and not only_scales(patch):
        kind, tensors = _parts(value)
        if kind in ("diff", "set") and not torch.is_tensor(tensors[0]):
            return "a full difference without a tensor"
    return ""


def misfit(patch: Patch, shape: Shape) -> str:
    """What a patch made for another shape is; "" if it fits, or where only applying it tells."""
    value = patch[1]
    want = reshaped(value, wanted(patch, shape)) or wanted(patch, shape)
    if isinstance(value, WeightAdapterBase):
        flat = (want[0], math.prod(want[1:])) if len(want) > 1 else (math.prod(want), 1)
        found = _shape(value, flat)
        if found is None or found == flat or (len(want) < 2 and math.prod(found) == flat[0]):
            return ""
        return f"a {NAMES.get(value.name, value.name)} of {times(found)} on {times(want)} weights"
    if not isinstance(value, tuple) or only_scales(patch):
        return ""
    kind, tensors = _parts(value)
    if kind not in ("diff", "set") or tuple(tensors[0].shape) == want:
        return ""
    return f"a full difference of {times(tensors[0].shape)} on {times(want)} weights"


def wanted(patch: Patch, shape: Shape) -> tuple:
    """The shape of what a patch changes: of all the tensor, or of the range in its offset (dimension, start,
    length)."""
    want = list(shape)
    if patch[3] is not None:
        want[patch[3][0]] = patch[3][2]
    return tuple(want)


def reshaped(value: object, shape: Shape) -> tuple | None:
    """The shape that a patch gives to a tensor of `shape`; None where it is the same. BFL's control LoRAs
    widen the input layer so."""
    to = value.weights[5] if isinstance(value, LoRAAdapter) else None
    if isinstance(value, tuple) and len(_parts(value)[1]) > 1 and isinstance(_parts(value)[1][1], dict):
        tensor, options = _parts(value)[1]
        to = tensor.shape if options.get("pad_weight") else None
    return None if to is None or tuple(to) == tuple(shape) else tuple(to)


def _parts(value):
    """(kind, tensors) of a patch that is a tuple."""
    if len(value) == 1:
        return "diff", value
    return (value[0], value[1]) if len(value) == 2 else (f"tuple of {len(value)}", ())


def times(shape: Shape) -> str:
    """A shape as text, such as 3072 x 64."""
    return " x ".join(str(int(n)) for n in shape)


def _shape(adapter, flat):
    """(n, k) of an adapter's difference; None where only applying it tells. flat: (n, k) of what it is
    for."""
    w = adapter.weights
    if isinstance(adapter, LoRAAdapter):
        return (w[0].shape[0], w[1].shape[1:].numel()) if w[3] is None else None
    if isinstance(adapter, LoHaAdapter):
        return (w[0].shape[0], w[1].shape[1]) if w[5] is None else None
    if isinstance(adapter, LoKrAdapter) and w[7] is None:
        sizes = [
            (
                _matrix(w[i])
                if w[i] is not None
                else torch.empty(w[j].shape[0], w[j + 1].shape[1], device="meta")
            )
            for i, j in ((0, 3), (1, 5))
        ]
        if sizes[1].ndim == 2:
            return tuple(a * b for a, b in zip(sizes[0].shape, sizes[1].shape, strict=True))
    if isinstance(adapter, OFTAdapter | BOFTAdapter):  # they turn the rows
        return math.prod(w[0].shape[-3:-1]), flat[1]
    return None


def effective(patches: Sequence[Patch]) -> list:
    """Those that change a weight: at strength 0 only ComfyUI's "set", and what also scales the weight, do."""
    return [p for p in patches if p[0] or p[2] != 1.0 or replaces(p)]


def side_of(patches: Sequence[Patch], layer: QuantizedLayer, key: str, device: torch.device | str) -> Side:
    """What `patches` put beside a QuantizedLayer, computed on `device`. Raises UnsupportedPatch."""
    side = Side(layer.spec.out_features, layer.spec.in_features)
    shape = layer.spec.logical_shape
    base = []  # the dequantized weight, made once and only where an adapter asks for it

    def weight():
        if not base:
            base.append(layer.to(device).dequantize())
        return side.weight(base[0])

    for patch in patches:
        reason = refused(patch, shape)
        if not reason and (mismatch := misfit(patch, shape)):
            reason = f"{mismatch}, made for another model,"
        if reason:
            raise UnsupportedPatch(f"{key}: {reason} cannot be put beside a quantized layer")
        _add(side, patch, key, weight, device, shape[2:])
    return side


def _add(
    side,
    patch,
    key,
    weight,
    device,
    behind,
):
    """behind: the sizes behind the two dimensions of a convolution's weight, which the side does not have."""
    strength, value, strength_model, offset, function = patch
    region = Region.of(offset, side.out_features, side.in_features)
    whole_rows = region.columns == side.in_features
    if only_scales(patch):
        if whole_rows or strength_model == 1.0:
            _scale(side, region, strength_model, device)
        else:
            _add_dense(
                side,
                (0.0, (None,), strength_model, offset, None),
                key,
                weight,
                device,
                behind,
            )
        return
    if isinstance(value, tuple) and function is None and whole_rows:
        _add_difference(
            side,
            value,
            region,
            strength,
            strength_model,
            device,
        )
        return
    term = _structured(value, device) if isinstance(value, WeightAdapterBase) else None
    # Reorders rows, so it commutes with the product.
    if isinstance(term, LowRank) and function is comfy.utils.swap_scale_shift:
        term, function = LowRank(term.down, function(term.up)), None
    magnitude = _dora_scale(value)
    by_row = magnitude is None or (magnitude.shape[0] == region.rows and isinstance(term, LowRank))
    if term is not None and function is None and whole_rows and by_row:
        _scale(side, region, strength_model, device)
        if magnitude is not None:
            rows = weight()[region.first : region.first + region.rows]
            ratio = magnitude.to(device, torch.float32).flatten() / (
                rows.norm(dim=1) + torch.finfo(torch.float32).eps
            )
            side.scale_rows(1 + strength * (ratio - 1), region.first)
            term = LowRank(term.down, term.up * ratio[:, None])
        _append(side, term, region.first, strength)
    elif isinstance(term, LowRank) and function is None and magnitude is None and strength_model == 1.0:
        down = term.down.new_zeros(term.down.shape[0], side.in_features)
        down[:, region.column : region.column + region.columns] = term.down
        side.low_rank.append(LowRank(down, term.up * strength))
    else:
        _add_dense(side, patch, key, weight, device, behind)


def _scale(side, region, strength_model, device):
    if strength_model != 1.0:
        side.scale(float(strength_model), region.rows, region.first, device)


def _add_difference(
    side,
    value,
    region,
    strength,
    strength_model,
    device,
):
    """ComfyUI's "diff" is added, "set" takes the place of all there is, whatever the strengths."""
    kind, (tensor, *_) = _parts(value)
    _scale(side, region, 0.0 if kind == "set" else strength_model, device)
    side.add_dense(
        tensor.to(device, torch.float32).flatten(1) * (1.0 if kind == "set" else strength), region.first
    )


def _add_dense(
    side,
    patch,
    key,
    weight,
    device,
    behind,
):
    """Whatever ComfyUI makes of the weight, minus the weight."""
    strength, value, *_ = patch
    current = weight()
    if torch.device(device).type == "meta":
        side.add_dense(current)
        return
    whole = current.clone().view(*current.shape, *behind)
    patched = comfy.lora.calculate_weight([patch], whole, key).flatten(1)
    if (
        strength
        and isinstance(value, WeightAdapterBase)
        and torch.equal(patched, current)
        and not _is_zero(value)
    ):
        raise UnsupportedPatch(
            f"{key}: ComfyUI could not apply a {value.name} to {times(current.shape)} weights; its log says "
            "why"
        )
    side.add_dense(patched - current)


def _append(side, term, first, strength):
    if isinstance(term, LowRank):
        side.low_rank.append(LowRank(term.down, term.up * strength, first))
    else:
        side.kronecker.append(Kronecker(term.left * strength, term.right, first))


def _dora_scale(value):
    index = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}.get(type(value))
    return None if index is None else value.weights[index]


def _is_zero(adapter) -> bool:
    return any(torch.is_tensor(w) and not w.any() for w in adapter.weights)


def _structured(adapter, device) -> LowRank | Kronecker | None:
    """The difference that an adapter adds at strength 1, alpha in it, fp32; None where it has no cheaper form
    than dense."""
    w = [t.to(device, torch.float32) if torch.is_tensor(t) else t for t in adapter.weights]
    if isinstance(adapter, LoRAAdapter) and w[3] is None:  # w[5], a shape, is the layer's own here
        up, down = w[0].flatten(1), w[1].flatten(1)
        return LowRank(down, up * _alpha(w[2], down.shape[0]))
    if isinstance(adapter, LoHaAdapter) and w[5] is None:
        up, down = hadamard_low_rank((w[0], w[1]), (w[3], w[4]))
        cheaper = down.shape[0] * (up.shape[0] + down.shape[1]) < up.shape[0] * down.shape[1]
        return LowRank(down, up * _alpha(w[2], w[1].shape[0])) if cheaper else None
    if isinstance(adapter, LoKrAdapter) and w[7] is None:
        left = w[0] if w[0] is not None else w[3] @ w[4]
        factors = None if w[1] is not None else (w[5], w[6])
        right = _matrix(w[1]) if w[1] is not None else w[5] @ w[6]
        if right.ndim != 2:
            return None
        rank = (
            None if w[0] is not None and w[1] is not None else (w[4] if w[1] is not None else w[6]).shape[0]
        )
        return kronecker_or_low_rank(left * (_alpha(w[2], rank) if rank else 1.0), right, factors)
    return None


def _matrix(factor):
    """A factor for a 1x1 convolution without its last dimensions."""
    return factor.flatten(1) if math.prod(factor.shape[2:]) == 1 else factor


def _alpha(alpha, rank) -> float:
    return 1.0 if alpha is None else float(alpha) / rank
