"""ComfyUI's nvfp4 layers as the one operator's, and back.

Source: TensorCoreNVFP4Layout and backends/eager of comfy-kitchen 0.2.31 and ComfyUI 0.33's comfy.ops. x is
multiplied by pre_quant_scale, and has one fp32 scale of the tensor: the file's input_scale where it has one,
else absmax / 2688. What differs here: ComfyUI rounds the product with pre_quant_scale to the dtype of x,
which in bf16 moves outputs by 2 %, a fifth of what 4 bits do; and it multiplies dequantized weights by 16-bit
x on cards without fp4 products, where these layers run as W8A8.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch

from ....kernels.operator import nvfp4
from ....kernels.operator.codes import NVFP4, ActivationSpec, WeightSpec
from ....kernels.operator.spec import LinearSpec, PartSpec
from ...layer.linear import QuantizedLayer
from .declared import Declaration
from .stored import LayoutError, Stored
from .tiles import natural, tiled

WEIGHT = WeightSpec(group=nvfp4.GROUP, grid=NVFP4)
ACTIVATION = ActivationSpec(group=nvfp4.GROUP, grid=NVFP4, outer="tensor")
ROWS = 16  # comfy-kitchen stores out-channels in multiples of that many

Read = Callable[[str], torch.Tensor | None]


def part_of(declared: Declaration, stored: dict[str, Stored], k: int, get: Read) -> PartSpec:
    """The one part of a layer with k in-channels. get: our name -> the file's tensor; of all of them only
    input_scale is read. Raises LayoutError."""
    activation = ACTIVATION if declared.activation_bits else None
    if activation is not None and (scale := get("input_scale")) is not None:
        fixed = scale.float().item()
        if not 0 < fixed < float("inf"):
            raise LayoutError(f"{stored['input_scale'].key}: expected a positive number, found {fixed}")
        activation = replace(ACTIVATION, fixed=fixed)
    return PartSpec(
        0,
        k,
        WEIGHT,
        activation,
        smooth="pre_quant_scale" in stored,
    )


def tensors_of(spec: LinearSpec, get: Read) -> dict[str, torch.Tensor]:
    """The layer but for its bias in the layout of memory. Raises LayoutError."""
    has = cast(Callable[[str], torch.Tensor], get)
    n, columns = spec.out_features, spec.width // nvfp4.GROUP
    out = {
        "weight": swapped(has("weight")),
        "weight_scale": natural(has("weight_scale").view(torch.float8_e4m3fn), n, columns).contiguous(),
        "outer_scale": has("weight_scale_2").reshape(1, 1).repeat(1, n),
    }
    if (factor := get("pre_quant_scale")) is not None:
        if not (factor.isfinite() & (factor > 0)).all():
            raise LayoutError("pre_quant_scale: expected positive numbers, found others")
        out["smooth_factor"] = 1 / factor.float()
    return out


def refused(spec: LinearSpec) -> str:
    """Why no nvfp4 layer of ComfyUI's computes what a layer of one part on the nvfp4 grid does, "" where one
    may: its tensors must have `one_scale`, too."""
    part = spec.parts[0]
    if part.smooth or part.rotation or part.rank:
        return f"smoothing, a rotation or a low rank ({spec.describe()}); ComfyUI's nvfp4 has none"
    act = part.activation
    if act is not None and replace(act, fixed=0.0) != ACTIVATION:
        return "nvfp4 activations with scales of tokens or either of two a group; ComfyUI's have one a tensor"
    if spec.out_features % ROWS:
        return f"nvfp4 weights of {spec.out_features} out-channels; ComfyUI's are a multiple of {ROWS}"
    return ""


def one_scale(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(weight_scale e4m3 (N, K / 16), one fp32 scale ()) that give the same weights bit for bit, None where
    there are none: rows' outer scales may differ by powers of two that e4m3 takes up exactly."""
    inner, outer = layer.tensors["weight_scale"], layer.tensors["outer_scale"][0]
    if bool((outer == outer[0]).all()):
        return inner, outer[0]
    mantissas, exponents = torch.frexp(outer)
    # A row of zeros fits any scale.
    largest = torch.ldexp(inner.float().amax(-1), exponents)
    held = largest > 0
    if len(mantissas[held].unique()) != 1:
        return None
    whole = nvfp4.power_below(largest.amax()) * mantissas[held.nonzero()[0, 0]]
    moved = inner.float() * (outer / whole)[:, None]
    rounded = torch.where(held[:, None], moved, 0).to(torch.float8_e4m3fn)
    return (rounded, whole) if torch.equal(rounded.float()[held], moved[held]) else None


def with_one_scale(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer with its `one_scale` for all rows: as it is written, and read back. Raises ValueError where
    it has none."""
    found = one_scale(layer)
    if found is None:
        raise ValueError(
            f"layer {layer.name}: its rows have scales of their own, expected one of the tensor as ComfyUI's "
            "nvfp4 has. Write it in 8 or 16 bit, or save the model in the pack's own format."
        )
    outer = found[1].reshape(1, 1).repeat(1, layer.spec.out_features)
    tensors = layer.tensors | {"weight_scale": found[0], "outer_scale": outer}
    return QuantizedLayer(layer.name, layer.spec, tensors)


def stored_of(layer: QuantizedLayer) -> dict[str, torch.Tensor]:
    """The tensors of a layer but for its bias as ComfyUI names them. Raises as `with_one_scale`."""
    tensors = with_one_scale(layer).tensors
    out = {
        "weight": swapped(tensors["weight"]).view(torch.uint8),
        "weight_scale": tiled(tensors["weight_scale"]),
        "weight_scale_2": tensors["outer_scale"][0, 0].clone(),
    }
    activation = layer.spec.parts[0].activation
    if activation is not None and activation.fixed:
        out["input_scale"] = torch.tensor(activation.fixed)
    return out


def swapped(packed: torch.Tensor) -> torch.Tensor:
    """Bytes of two codes with the nibbles exchanged, int8 of any shape: ComfyUI's even channels are the high
    ones, ours the low ones."""
    raw = packed.view(torch.uint8)
    return ((raw >> 4) | (raw << 4)).view(torch.int8)
