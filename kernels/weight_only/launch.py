"""Launches the weight-only product."""

import triton

from ..target import kernel_target
from .triton import weight_only_kernel


def weight_only(x, weight, weight_scale, bias, y, bits, group):
    """x (M, K) 16 bit, weight (N, bytes), weight_scale (groups or 1, N), bias (N,) or None -> y (M, N).
    group: channels, 0 for none."""
    tokens, channels = x.shape[0], weight.shape[0]
    if not tokens:
        return
    target = kernel_target(x.device)
    chosen = constants(target, tokens, bits, group, bias is not None)
    weight_only_kernel[(triton.cdiv(channels, chosen["BN"]), triton.cdiv(tokens, chosen["BM"]))](
        x,
        weight,
        weight_scale,
        bias if bias is not None else weight_scale,
        y,
        tokens,
        channels,
        weight.shape[1],
        x.stride(0),
        weight.stride(0),
        y.stride(0),
        weight_scale.stride(0),
        **chosen,
        **options(target, chosen["BM"]),
    )


def constants(target, tokens: int, bits: int, group: int, has_bias: bool) -> dict:
    """The kernel's compile-time arguments."""
    return {
        "PLANES": 8 // bits,
        "GROUPED": bool(group),
        "HAS_BIAS": has_bias,
        "BM": 16 if tokens <= 16 else 32 if tokens <= 32 else 64,
        "BN": 16 if target.interpreted else 32,
        "BK": group * bits // 8 if group else 64,
        "ASM": target.backend == "cuda",
        "UPCAST": target.interpreted,
    }


def options(target, rows: int) -> dict:
    """Bound by memory: the more loads in flight, the better. RDNA spills with four warps on 16 rows."""
    if target.backend == "hip":
        return {"num_warps": 2 if rows == 16 else 4, "num_stages": 2}
    return {"num_warps": 4, "num_stages": 4}
