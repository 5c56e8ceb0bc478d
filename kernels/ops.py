"""The operators of torch that hold the kernels.

`layer`, a whole quantized layer, is what torch.compile sees: one node, planned at run time, with no graph break. Those below it are
the kernels. They write into buffers of the caller and return nothing, so their fake versions have nothing to compute.

The namespace follows the name under which the pack was imported. ComfyUI imports a custom node under the path of its folder, which may
hold any letter, while torch's schemas are ASCII: so it is a hash of that name, another one for every copy that stands beside this one.
"""

import hashlib
import importlib

import torch

from ..quant_core.spec import parse
from . import before as fusible
from .target import kernel_target

NAMESPACE = f"nibble_{hashlib.sha256(__package__.encode(errors='surrogatepass')).hexdigest()[:12]}"
_library = torch.library.Library(NAMESPACE, "DEF")

_TENSORS = ("weight", "weight_scale", "smooth_factor", "proj_down", "proj_up", "bias", "transform")  # of a layer, as in its schema
_SCHEMAS = {
    "layer": "(Tensor x, str spec, Tensor weight, Tensor weight_scale, Tensor? smooth_factor, Tensor? proj_down, Tensor? proj_up, "
    "Tensor? bias, Tensor? transform, Tensor[] lora_down, Tensor[] lora_up, int[] lora_first, int prologue, Tensor? mod_scale, Tensor? mod_shift, float eps) "
    "-> Tensor",
    "quantize_activation": "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!)? low, Tensor? smooth, Tensor? down, "
    "Tensor? mod_scale, Tensor? mod_shift, int width, int count, int planes, int bits, bool unsigned, bool grouped, int rotation, "
    "float shift, float clip, int prologue, float eps) -> ()",
    "quantize_kronecker": "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor? smooth, Tensor factors, Tensor? mod_scale, "
    "Tensor? mod_shift, int count, int slices, int p1, int p2, bool per_slice, int planes, int bits, bool unsigned, float clip, "
    "int prologue, float eps) -> ()",
    "gemm": "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? low, Tensor? up, Tensor? bias, Tensor(a!) y, "
    "str kernel, int planes, int scales, bool swap, int block, int[] ends, bool act_grouped, bool accumulate) -> ()",
    "weight_only": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor(a!) y, int bits, int group) -> ()",
    "quantize_fp4": "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) token_scale, Tensor(d!)? low, Tensor? smooth, "
    "Tensor? down, Tensor? tensor_scale) -> ()",
    "gemm_fp4": "(Tensor codes, Tensor scale, Tensor token_scale, Tensor weight, Tensor weight_scale, Tensor? tensor_scale, "
    "Tensor? low, Tensor? up, Tensor? bias, Tensor(a!) y) -> ()",
}


def quant_linear(x, spec, tensors, lora=(), before=None):
    """`layer` on a LinearSpec and its tensors: x (M, K) of a dtype that the kernels take -> y (M, N). Arguments as in `dispatch`."""
    downs, ups, firsts = [down for down, _, _ in lora], [up for _, up, _ in lora], [first for _, _, first in lora]
    kind, *modulation = before.operands(slice(None)) if before is not None else fusible.NOTHING
    return layer(x, spec.text, *(tensors.get(name) for name in _TENSORS), downs, ups, firsts, kind, *modulation)


def _layer(x, spec, *args):
    from .lora import with_lora
    from .quant_linear import fast

    tensors = {name: tensor for name, tensor in zip(_TENSORS, args, strict=False) if tensor is not None}
    downs, ups, firsts, *prologue = args[len(_TENSORS) :]
    spec, tensors = with_lora(parse(spec), tensors, list(zip(downs, ups, firsts, strict=True)), x.dtype)
    run = fast.weight_only if spec.weight_only else fast.quant_linear
    return run(x if x.stride(-1) == 1 else x.contiguous(), spec, tensors, kernel_target(x.device), fusible.restored(*prologue))


def _launched(folder: str, name: str):
    """The launch function of a kernel, imported at the first call: a machine without Triton registers the operators all the same."""

    def run(*args):
        launch = getattr(importlib.import_module(f".{folder}.launch", __package__), name)
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            launch(*args)

    return run


_FOLDERS = {"gemm": "quant_linear", "weight_only": "weight_only"}
_FOLDERS |= dict.fromkeys(("quantize_activation", "quantize_kronecker"), "quant_activation") | {"quantize_fp4": "fp4", "gemm_fp4": "fp4"}
_FUNCTIONS = {"layer": _layer} | {name: _launched(folder, name) for name, folder in _FOLDERS.items()}
for _name, _function in _FUNCTIONS.items():
    _library.define(_name + _SCHEMAS[_name])
    for _key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
        _library.impl(_name, _function, _key)
    _fake = (lambda x, spec, weight, *args: x.new_empty(x.shape[0], weight.shape[0])) if _name == "layer" else (lambda *args: None)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

_ops = getattr(torch.ops, NAMESPACE)
layer, gemm, weight_only = _ops.layer, _ops.gemm, _ops.weight_only
quantize_activation, quantize_kronecker = _ops.quantize_activation, _ops.quantize_kronecker
quantize_fp4, gemm_fp4 = _ops.quantize_fp4, _ops.gemm_fp4
