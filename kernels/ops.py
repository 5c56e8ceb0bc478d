"""The operators of torch that hold the kernels. They write into buffers of the caller and return nothing, so
their fake versions have nothing to compute. `quant_linear.op` is the whole layer above them.

The namespace follows the name under which the pack was imported. ComfyUI imports a custom node under the path
of its folder, which may hold any letter, while torch's schemas are ASCII: so it is a hash of that name,
another one for every copy that stands beside this one.
"""

import hashlib
import importlib

import torch

NAMESPACE = f"nibble_{hashlib.sha256(__package__.encode(errors='surrogatepass')).hexdigest()[:12]}"
_library = torch.library.Library(NAMESPACE, "DEF")

_SCHEMAS = {
    "quantize_activation": "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!)? low, Tensor? smooth, Tensor? down, "
    "Tensor? mod_scale, Tensor? mod_shift, int width, int count, int planes, int bits, bool unsigned, bool "
    "grouped, int rotation, "
    "float shift, float clip, int prologue, float eps) -> ()",
    "quantize_kronecker": "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor? smooth, Tensor factors, Tensor? mod_scale, "
    "Tensor? mod_shift, int count, int slices, int p1, int p2, bool per_slice, int planes, int bits, bool "
    "unsigned, float clip, "
    "int prologue, float eps) -> ()",
    "gemm": "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? low, Tensor? up, Tensor? "
    "bias, Tensor(a!) y, "
    "str kernel, int planes, int scales, bool swap, int block, int[] ends, bool act_grouped, bool "
    "accumulate) -> ()",
    "weight_only": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor(a!) y, int bits, int group) "
    "-> ()",
    "quantize_fp4": "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) token_scale, Tensor(d!)? low, Tensor? "
    "smooth, "
    "Tensor? down, Tensor? tensor_scale) -> ()",
    "gemm_fp4": "(Tensor codes, Tensor scale, Tensor token_scale, Tensor weight, Tensor weight_scale, Tensor? "
    "tensor_scale, "
    "Tensor? low, Tensor? up, Tensor? bias, Tensor(a!) y) -> ()",
}


def _launched(folder: str, name: str):
    """The launch function of a kernel, imported at the first call: a machine without Triton registers the
    operators all the same."""

    def run(*args):
        launch = getattr(importlib.import_module(f".{folder}.launch", __package__), name)
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            launch(*args)

    return run


_FOLDERS = {"gemm": "quant_linear", "weight_only": "weight_only"}
_FOLDERS |= dict.fromkeys(("quantize_activation", "quantize_kronecker"), "quant_activation") | {
    "quantize_fp4": "fp4",
    "gemm_fp4": "fp4",
}


def register(name: str, schema: str, function, fake):
    """Defines an operator of our namespace and returns it. CUDA and, for Triton's interpreter, CPU; fake:
    what torch.compile traces."""
    _library.define(name + schema)
    for key in ("CUDA", "CPU"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name)


gemm, weight_only, quantize_activation, quantize_kronecker, quantize_fp4, gemm_fp4 = (
    register(name, _SCHEMAS[name], _launched(_FOLDERS[name], name), lambda *args: None)
    for name in (
        "gemm",
        "weight_only",
        "quantize_activation",
        "quantize_kronecker",
        "quantize_fp4",
        "gemm_fp4",
    )
)
