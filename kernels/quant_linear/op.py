"""A whole quantized layer as one operator of torch: what torch.compile sees, planned at run time, with no
graph break."""

from .. import prologue as fusible
from ..lora import with_lora
from ..operator.spec import parse
from ..ops import register
from ..target import kernel_target
from . import fused

_TENSORS = (
    "weight",
    "weight_scale",
    "smooth_factor",
    "proj_down",
    "proj_up",
    "bias",
    "transform",
)  # of a layer, as in the schema
_SCHEMA = (
    "(Tensor x, str spec, Tensor weight, Tensor weight_scale, Tensor? smooth_factor, Tensor? proj_down, "
    "Tensor? proj_up, "
    "Tensor? bias, Tensor? transform, Tensor[] lora_down, Tensor[] lora_up, int[] lora_first, int "
    "prologue, Tensor? mod_scale, "
    "Tensor? mod_shift, float eps) -> Tensor"
)


def quant_linear(x, spec, tensors, lora=(), before=None):
    """`layer` on a LinearSpec and its tensors: x (M, K) of a dtype that the kernels take -> y (M, N).
    Arguments as in `dispatch`."""
    downs, ups, firsts = (
        [down for down, _, _ in lora],
        [up for _, up, _ in lora],
        [first for _, _, first in lora],
    )
    kind, *modulation = before.operands(slice(None)) if before is not None else fusible.NOTHING
    return layer(
        x, spec.text, *(tensors.get(name) for name in _TENSORS), downs, ups, firsts, kind, *modulation
    )


def _layer(x, spec, *args):
    tensors = {name: tensor for name, tensor in zip(_TENSORS, args, strict=False) if tensor is not None}
    downs, ups, firsts, *prologue = args[len(_TENSORS) :]
    spec, tensors = with_lora(parse(spec), tensors, list(zip(downs, ups, firsts, strict=True)), x.dtype)
    run = fused.weight_only if spec.weight_only else fused.quant_linear
    return run(
        x if x.stride(-1) == 1 else x.contiguous(),
        spec,
        tensors,
        kernel_target(x.device),
        fusible.restored(*prologue),
    )


layer = register(
    "layer", _SCHEMA, _layer, lambda x, spec, weight, *args: x.new_empty(x.shape[0], weight.shape[0])
)
