"""The kernels as torch operators: what torch.compile sees, with no graph break.

They write into buffers of the caller and return nothing, so their fake versions have nothing to compute. The namespace is the name
under which the pack was imported: ComfyUI loads a custom node under its folder's name, and a second copy may be installed by pip.
"""

import re

import torch

NAMESPACE = re.sub(r"\W", "_", __package__)
_library = torch.library.Library(NAMESPACE, "DEF")

_SCHEMAS = {
    "quantize_activation": "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!)? low, Tensor? smooth, Tensor? down, "
    "Tensor? mod_scale, Tensor? mod_shift, int width, int count, int planes, int bits, bool unsigned, bool grouped, int rotation, "
    "float shift, float clip, int prologue, float eps) -> ()",
    "gemm": "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? low, Tensor? up, Tensor? bias, Tensor(a!) y, "
    "str kernel, int planes, int scales, bool swap, int block, int[] ends, bool act_grouped, bool accumulate) -> ()",
    "weight_only": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor(a!) y, int bits, int group) -> ()",
}


def _quantize_activation(*args):
    from .quant_activation.launch import quantize_activation

    quantize_activation(*args)


def _gemm(*args):
    from .quant_linear.launch import gemm

    gemm(*args)


def _weight_only(*args):
    from .weight_only.launch import weight_only

    weight_only(*args)


# Imported at the first call: a machine without Triton registers the operators all the same.
for _name, _function in {"quantize_activation": _quantize_activation, "gemm": _gemm, "weight_only": _weight_only}.items():
    _library.define(_name + _SCHEMAS[_name])
    for _key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", lambda *args: None, lib=_library)

_ops = getattr(torch.ops, NAMESPACE)
quantize_activation, gemm, weight_only = _ops.quantize_activation, _ops.gemm, _ops.weight_only
