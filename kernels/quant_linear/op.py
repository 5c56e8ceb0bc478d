"""A whole quantized layer as one operator of torch: what torch.compile sees, planned at run time, with no
graph break.

The namespace follows the name under which the pack was imported. ComfyUI imports a custom node under the path
of its folder, which may hold any letter, while torch's schemas are ASCII: so it is a hash of that name,
another one for every copy that stands beside this one.
"""

import hashlib

import torch

from ..operator.text import parse
from ..prologue import NOTHING, restored
from ..target import kernel_target

NAMESPACE = f"nibble_{hashlib.sha256(__package__.encode(errors='surrogatepass')).hexdigest()[:12]}"
_SCHEMA = (
    "layer(Tensor x, str spec, Tensor weight, Tensor weight_scale, Tensor? smooth_factor, Tensor? proj_down, "
    "Tensor? proj_up, Tensor? bias, Tensor? transform, Tensor? outer_scale, int prologue, Tensor? mod_scale, "
    "Tensor? mod_shift, float eps) -> Tensor"
)


def quant_linear(x, spec, tensors, prologue=None):
    """`layer` on a LinearSpec and its tensors: x (M, K) of a dtype that the kernels take -> y (M, N)."""
    get = tensors.get
    return layer(
        x,
        spec.text,
        tensors["weight"],
        tensors["weight_scale"],
        get("smooth_factor"),
        get("proj_down"),
        get("proj_up"),
        get("bias"),
        get("transform"),
        get("outer_scale"),
        *(NOTHING if prologue is None else prologue.operands(slice(None))),
    )


def _layer(
    x, text, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, transform, outer_scale, *prologue
):
    from . import fused  # imports Triton, which a machine may not have

    spec, prologue = parse(text), restored(*prologue)
    tensors = {"weight": weight, "weight_scale": weight_scale, "smooth_factor": smooth_factor, "bias": bias}
    tensors |= {"proj_down": proj_down, "proj_up": proj_up, "transform": transform}
    tensors |= {"outer_scale": outer_scale}
    if x.stride(-1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if spec.weight_only:
            return fused.weight_only(x, spec, tensors, prologue)
        return fused.quant_linear(x, text, tensors, kernel_target(x.device), prologue)


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(_SCHEMA)
for _key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
    _library.impl("layer", _layer, _key)
torch.library.register_fake(
    f"{NAMESPACE}::layer",
    lambda x, spec, weight, *args: x.new_empty(x.shape[0], weight.shape[0]),
    lib=_library,
)
layer = getattr(torch.ops, NAMESPACE).layer
