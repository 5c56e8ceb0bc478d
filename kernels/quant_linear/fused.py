"""The operator on the Triton kernels: quantize, multiply, one launch each for most layers."""

import torch

from .. import ops
from ..fp16 import HALF, balanced_parts, row_power
from ..operator.transforms import transform_activation
from ..plan import Gemm, lower
from ..prologue import NOTHING, Before
from ..target import Target
from ..tuning import low_rank_limit


def quant_linear(x, spec, tensors, target: Target, before: Before | None = None):
    """x (M, K), 16 bit, last dimension contiguous -> y (M, N) in its dtype. `tensors` as LinearSpec has them."""
    if before is not None and ((spec.rank and not _fused(spec, target)) or not before.fits(spec)):
        x, before = before(x), None
    launches, low = lower(spec, target), empty_low(x, spec)
    if spec.rank and x.dtype == HALF:
        tensors = tensors | dict(zip(("proj_down", "proj_up"), balanced_parts(spec, tensors), strict=True))
    # Between launches a sum may leave fp16 that does not in the end; where there is one launch, as for most
    # layers, nothing changes.
    between = torch.float32 if x.dtype == HALF and len(launches) > 1 else x.dtype
    y = torch.empty(x.shape[0], spec.out_features, dtype=between, device=x.device)
    for step in launches:
        codes, scale = quantize(x, spec, tensors, target, step, low, before)
        last = step is launches[-1]
        ops.gemm(
            codes, scale, tensors["weight"][:, step.column : step.column + step.row_bytes],
            tensors["weight_scale"][step.row : step.row + step.weight_segments],
            low if last else None, tensors["proj_up"] if last and spec.rank else None, tensors["bias"] if last and spec.bias else None,
            y, step.kernel, step.planes, step.scales, step.swap, step.block, step.ends, step.act_grouped, step is not launches[0],
        )  # fmt: skip
    return y.to(x.dtype)


def _fused(spec, target: Target) -> bool:
    """Whether the quantizer computes the low-rank projection down."""
    return 0 < spec.rank <= min(0 if p.kronecker else low_rank_limit(target, p.rotation) for p in spec.parts)


def empty_low(x, spec):
    """The buffer of x @ proj_down, (M, parts * R) part by part; None without a low-rank branch."""
    return (
        torch.empty(x.shape[0], spec.rank * len(spec.parts), dtype=x.dtype, device=x.device)
        if spec.rank
        else None
    )


def quantize(x, spec, tensors, target: Target, step: Gemm, low, before: Before | None = None):
    """(codes, scale) of x (M, K) for one launch of the product; its parts' columns of `low` are written."""
    tokens, device = x.shape[0], x.device
    codes = torch.empty(tokens, step.code_bytes, dtype=torch.int8, device=device)
    scale = torch.empty(step.act_segments, tokens, dtype=torch.float32, device=device)
    fused, smooth = _fused(spec, target), tensors.get("smooth_factor")
    down = tensors["proj_down"].to(x.dtype) if spec.rank else None
    segment, number = 0, spec.parts.index(step.parts[0])
    for run in step.runs:
        part, act = run.part, run.part.activation
        columns = slice(part.start, part.start + part.width * run.count)
        offset = (part.start - step.start) // max(step.planes or 2, 1)
        segments = run.count * (part.width // 64 if step.act_grouped else 1)
        ranks = slice(number * spec.rank, (number + run.count) * spec.rank)
        kind, mod_scale, mod_shift, eps = before.operands(columns) if before is not None else NOTHING
        out, smoothing = (
            (codes[:, offset:], scale[segment : segment + segments]),
            smooth[columns] if part.smooth else None,
        )
        if part.kronecker:
            at = sum(p.factor_values for p in spec.parts[:number])
            factors = tensors["transform"][at : at + run.count * part.factor_values]
            p1, p2 = part.kronecker
            ops.quantize_kronecker(
                x[:, columns], *out, smoothing, factors, mod_scale, mod_shift, run.count, part.width // (p1 * p2), p1, p2, part.per_slice,
                step.planes, act.bits, act.unsigned, act.clip, kind, eps,
            )  # fmt: skip
        else:
            ops.quantize_activation(
                x[:, columns], *out, low[:, ranks] if fused else None, smoothing, down[columns] if fused else None,
                mod_scale, mod_shift, part.width, run.count, step.planes, act.bits, act.unsigned, step.act_grouped, part.rotation,
                act.shift, act.clip, kind, eps,
            )  # fmt: skip
        if spec.rank and not fused:
            for i in range(run.count):
                at = slice(part.start + i * part.width, part.start + (i + 1) * part.width)
                r = (number + i) * spec.rank
                torch.mm(x[:, at], down[at], out=low[:, r : r + spec.rank])
        segment, number = segment + segments, number + run.count
    return codes, scale


def weight_only(x, spec, tensors, target: Target, before: Before | None = None):
    """As `quant_linear` for parts with 16-bit activations. The transforms of a few rows are left to torch."""
    if before is not None:
        x = before(x)
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
        ops.weight_only(tx, packed, scales, bias, out, part.weight.bits, group)
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
        ops.weight_only(
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
