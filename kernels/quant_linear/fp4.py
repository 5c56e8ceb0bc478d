"""The operator on the nvfp4 grid by the kernels of `fp4`: for each part a launch of the quantizer, with the
steps that it fuses, and one of the block-scaled product."""

import torch

from ..fp4.launch import gemm_fp4, quantize_fp4
from ..operator.nvfp4 import GROUP, largest, tensor_scale
from ..prologue import NOTHING, Prologue
from .arguments import Plan


def multiply(x, plan: Plan, tensors, low, y, prologue: Prologue | None = None):
    """y (M, N) of x (M, K), 16 bit. `low`, (M, parts R) or None, is the buffer of the low rank, whose columns
    of a part are written before the last product adds them."""
    tokens, device = x.shape[0], x.device
    weight, inner, outer = (tensors[name].view(kind) for name, kind in _OPERANDS)
    smooth, down = tensors.get("smooth_factor"), tensors.get("proj_down")
    if plan.low and down.dtype != x.dtype:
        down = down.to(x.dtype)
    for number, (launch, part) in enumerate(zip(plan.launches, plan.spec.parts, strict=True)):
        (step,) = launch.quantize
        columns, act = step.columns, part.activation
        assert act is not None  # a Plan has quantized activations
        codes = torch.empty(tokens, part.width // 2, dtype=torch.uint8, device=device)
        scale = torch.empty(tokens, part.width // GROUP, dtype=torch.float8_e4m3fn, device=device)
        token_scale = torch.empty(tokens, dtype=torch.float32, device=device)
        kind, mod_scale, mod_shift, eps = NOTHING if prologue is None else prologue.operands(columns)
        if plan.low and not plan.fused:
            torch.mm(x[:, columns], down[columns], out=low[:, step.ranks])
        used = plan.fused or step.principal
        branch, of = (low[:, step.ranks], down[columns]) if used else (None, None)
        divisor = smooth[columns] if step.smooth else None
        quantize_fp4(
            x[:, columns],
            codes,
            scale,
            token_scale,
            branch,
            divisor,
            of,
            _tensor_scale(x[:, columns], act, divisor),
            mod_scale,
            mod_shift,
            part.rotation,
            act.either,
            kind,
            eps,
            step.principal,
        )
        up, bias = (tensors.get("proj_up"), tensors.get("bias")) if launch.last else (None, None)
        gemm_fp4(
            codes,
            scale,
            token_scale,
            weight[:, launch.columns],
            inner[:, launch.rows],
            outer[number],
            low if launch.last else None,
            up,
            bias,
            y,
            number > 0,
        )


def _tensor_scale(x, act, divisor):
    """(1,) fp32 where one scale is above those of all tokens of x (M, w), else None. divisor (w,): what the
    quantizer divides x by, or None."""
    if act.outer == "token":
        return None
    if act.fixed:
        return torch.full((1,), act.fixed, device=x.device)
    if divisor is None:
        return tensor_scale(largest(x), x.dtype).view(1)
    # The largest of a channel divided is the largest quotient: one pass over x, in its own dtype.
    of_channels = torch.linalg.vector_norm(x, torch.inf, dim=0) if len(x) else x.new_zeros(x.shape[1])
    return tensor_scale(largest(of_channels.float() / divisor.float()), x.dtype).view(1)


_OPERANDS = (
    ("weight", torch.uint8),
    ("weight_scale", torch.float8_e4m3fn),
    ("outer_scale", torch.float32),
)
