"""Launches the weight-only product."""

import triton

from ..target import target_of
from .triton import weight_only_kernel


def weight_only(x, weight, weight_scale, bias, y, bits, group):
    """x (M, K) 16 bit, weight (N, bytes), weight_scale (groups or 1, N), bias (N,) or None -> y (M, N). group: channels, 0 for none."""
    tokens, channels, planes = x.shape[0], weight.shape[0], 8 // bits
    if not tokens:
        return
    target = target_of(x.device)
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    block = group // planes if group else 64
    columns = 16 if target.interpreted else 32
    weight_only_kernel[(triton.cdiv(channels, columns), triton.cdiv(tokens, rows))](
        x, weight, weight_scale, bias if bias is not None else weight_scale, y,
        tokens, channels, weight.shape[1], x.stride(0), weight.stride(0), y.stride(0), weight_scale.stride(0),
        PLANES=planes, GROUPED=bool(group), HAS_BIAS=bias is not None, BM=rows, BN=columns, BK=block,
        ASM=target.backend == "cuda", UPCAST=target.interpreted, num_warps=4, num_stages=4 if target.backend == "cuda" else 2,
    )  # fmt: skip
