"""The operator on the Triton kernels: quantize, multiply, one launch each for most layers."""

from typing import Any

import torch

from ..fp16 import HALF, balanced_parts, row_power
from ..operator.codes import NVFP4
from ..operator.transforms import transform_activation
from ..prologue import NOTHING, Prologue
from ..quant_activation.launch import quantize_activation, quantize_kronecker
from ..target import Target
from ..weight_only.launch import weight_only as weight_only_product
from . import fp4
from .arguments import Launch, Plan, plan_of
from .launch import gemm


def quant_linear(
    x,
    text: str,
    tensors,
    target: Target,
    prologue: Prologue | None = None,
):
    """x (M, K), 16 bit, last dimension contiguous -> y (M, N) in its dtype. text: of the LinearSpec, whose
    `tensors` these are."""
    plan = plan_of(text, target.fields)
    spec, fused = plan.spec, plan.fused
    whole = any(p.activation and p.activation.measures_tensor for p in spec.parts)
    if prologue is not None and (whole or (spec.rank and not fused) or not prologue.fits(spec)):
        x, prologue = prologue(x), None
    low = empty_low(x, plan)
    if spec.rank and x.dtype == HALF:
        tensors = tensors | dict(zip(("proj_down", "proj_up"), balanced_parts(spec, tensors), strict=True))
    # Between launches a sum may leave fp16 that does not in the end; where there is one launch, as for most
    # layers, nothing changes.
    between = torch.float32 if x.dtype == HALF and len(plan.launches) > 1 else x.dtype
    y = torch.empty(x.shape[0], spec.out_features, dtype=between, device=x.device)
    if spec.grid == NVFP4:
        fp4.multiply(x, plan, tensors, low, y, prologue)
        return y if between == x.dtype else y.to(x.dtype)
    weight, weight_scale = tensors["weight"], tensors["weight_scale"]
    for launch in plan.launches:
        codes, scale = quantize(
            x,
            plan,
            launch,
            tensors,
            low,
            prologue,
        )
        up, bias = (tensors.get("proj_up"), tensors.get("bias")) if launch.last else (None, None)
        gemm(
            codes,
            scale,
            weight[:, launch.columns],
            weight_scale[launch.rows],
            low if launch.last else None,
            up,
            bias,
            y,
            *launch.settings,
        )
    return y if between == x.dtype else y.to(x.dtype)


def empty_low(x, plan: Plan):
    """The buffer of x @ proj_down, (M, parts * R) part by part; None without a low-rank branch."""
    return torch.empty(x.shape[0], plan.low, dtype=x.dtype, device=x.device) if plan.low else None


def quantize(
    x,
    plan: Plan,
    launch: Launch,
    tensors,
    low,
    prologue: Prologue | None = None,
):
    """(codes, scale) of x (M, K) for one launch of the product; its parts' columns of `low` are written.

    Where the quantizer takes no such rank, or principal components need them first, torch makes them.
    """
    tokens, device, fused = x.shape[0], x.device, plan.fused
    codes = torch.empty(tokens, launch.code_bytes, dtype=torch.int8, device=device)
    scale = torch.empty(launch.segments, tokens, dtype=torch.float32, device=device)
    smooth, down = tensors.get("smooth_factor"), tensors.get("proj_down")
    if plan.low and down.dtype != x.dtype:
        down = down.to(x.dtype)
    for step in launch.quantize:
        columns = step.columns
        kind, mod_scale, mod_shift, eps = prologue.operands(columns) if prologue is not None else NOTHING
        into = x[:, columns], codes[:, step.code :], scale[step.segments]
        divisor = smooth[columns] if step.smooth else None
        settings: Any = (*step.settings, kind, eps)
        if plan.low and not fused:
            for at, ranks in step.parts:
                torch.mm(x[:, at], down[at], out=low[:, ranks])
        if step.factors is not None:
            operands = divisor, tensors["transform"][step.factors], mod_scale, mod_shift
            quantize_kronecker(*into, *operands, *settings)
        else:
            used = fused or step.principal
            branch, of = (low[:, step.ranks], down[columns]) if used else (None, None)
            more: Any = (branch, divisor, of, mod_scale, mod_shift, *settings, step.principal)
            quantize_activation(*into, *more)
    return codes, scale


def weight_only(x, spec, tensors, prologue: Prologue | None = None):
    """As `quant_linear` for parts with 16-bit activations. The transforms of a few rows are left to torch."""
    if prologue is not None:
        x = prologue(x)
    if x.dtype == HALF and (
        spec.rank or len(spec.parts) > 1 or any(p.smooth or p.rotation for p in spec.parts)
    ):
        return _weight_only_in_range(x, spec, tensors)
    y = None
    for i, (part, packed, scales, smooth) in enumerate(spec.split(tensors)):
        xp = x[:, part.start : part.stop]
        tx = transform_activation(xp, None if smooth is None else smooth, part.rotation)
        bias = tensors["bias"] if spec.bias and not i else None
        out = torch.empty(x.shape[0], spec.out_features, dtype=x.dtype, device=x.device)
        group = part.weight.group if part.weight.granularity == "group" else 0
        weight_only_product(
            tx,
            packed,
            scales,
            bias,
            out,
            part.weight.bits,
            group,
        )
        if spec.rank:
            up = tensors["proj_up"][:, i * spec.rank : (i + 1) * spec.rank].to(x.dtype)
            out.addmm_(xp @ tensors["proj_down"][part.start : part.stop].to(x.dtype), up.T)
        y = out if y is None else y + out
    return y


def _weight_only_in_range(x, spec, tensors):
    """`weight_only` in fp16 where more than one term is rounded: each token divided by a power of two, as in
    `eager`."""
    transformed = [
        transform_activation(x[:, p.start : p.stop].float(), s, p.rotation)
        for p, _, _, s in spec.split(tensors)
    ]
    power = row_power(*(t.abs() for t in transformed))
    inverse = 1 / power
    y = torch.zeros(x.shape[0], spec.out_features, dtype=HALF, device=x.device)
    if spec.bias:
        y += tensors["bias"].float() * inverse
    down, up = balanced_parts(spec, tensors) if spec.rank else (None, None)
    for i, (tx, (part, packed, scales, _)) in enumerate(zip(transformed, spec.split(tensors), strict=True)):
        out = torch.empty_like(y)
        weight_only_product(
            (tx * inverse).to(HALF),
            packed,
            scales,
            None,
            out,
            part.weight.bits,
            part.weight.group if part.scale_rows > 1 else 0,
        )
        if spec.rank:
            low = x[:, part.start : part.stop] @ down[part.start : part.stop] * inverse
            out.addmm_(low.to(HALF), up[:, i * spec.rank : (i + 1) * spec.rank].T)
        y += out
    return y.mul_(power)
