"""Launches the quantized matrix product."""

import torch
import triton

from ..plan import GROUP, MAX_SLICES, SLICE
from ..target import kernel_target
from ..tuning import Problem, Tile, gemm_tile
from . import triton as kernels


def gemm(codes, scale, weight, weight_scale, low, up, bias, y, kernel, planes, scales, swap, block, ends, act_grouped, accumulate):
    """codes (M, ...) int8, scale (segments or 1, M) fp32, weight (N, bytes), weight_scale (segments or 1, N) -> y (M, N).

    low (M, R) and up (N, R), or None; bias (N,) or None. `kernel`, `planes`, `scales`, `swap`, `block` and `ends` as in `plan.Gemm`.
    act_grouped: the activations' scales change with the group. accumulate: y is added to.
    """
    tokens, channels, row_bytes = codes.shape[0], weight.shape[0], weight.shape[1]
    if not tokens:
        return
    target = kernel_target(codes.device)
    rank = 0 if low is None else low.shape[1]
    problem = Problem(kernel, planes, scales, swap, tokens, channels, row_bytes, block)
    tile = gemm_tile(target, problem)
    empty = scale  # a pointer that is never read
    magic = weight_scale.dtype in (torch.bfloat16, torch.float16)
    getattr(kernels, kernel)[(triton.cdiv(tokens, tile.bm) * triton.cdiv(channels, tile.bn),)](
        codes, weight, scale, weight_scale, (*ends, *[-1] * (MAX_SLICES - len(ends))) if scales == SLICE else (-1,) * MAX_SLICES,
        empty if low is None else low, empty if up is None else up, empty if bias is None else bias, y,
        tokens, channels, row_bytes, rank, codes.stride(0), weight.stride(0), y.stride(0),
        tokens if act_grouped or scales == SLICE else 0,
        weight_scale.stride(0) if weight_scale.shape[0] > 1 else 0,
        0 if low is None else low.stride(0), 0 if up is None else up.stride(0), codes.shape[1] // max(planes, 1),
        **constants(target, problem, tile, magic, rank, bias is not None, accumulate), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def constants(target, problem: Problem, tile: Tile, magic: bool, rank: int, has_bias: bool, accumulate: bool) -> dict:
    """The kernel's compile-time arguments. magic: the weight scales have 16 bits."""
    return {
        "PLANES": max(problem.planes, 1),
        "SCALES": problem.scales,
        "SWAP": problem.swap,
        "EVEN_K": problem.row_bytes % tile.bk == 0,
        "MAGIC": problem.scales == GROUP and magic,
        "HAS_BIAS": has_bias,
        "ACCUMULATE": accumulate,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "BR": tile.rank_block if rank else 0,
        "GROUP_M": tile.group_m,
        "ASM": target.backend == "cuda",
        "UPCAST": target.interpreted,
    }
