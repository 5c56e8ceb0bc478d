"""Launches the quantized matrix product."""

import torch
import triton

from ..plan import GROUP, MAX_SLICES, SLICE
from ..target import kernel_target
from ..tuning import Problem, Tile, candidates, gemm_tile
from . import triton as kernels


def gemm(
    codes,
    scale,
    weight,
    weight_scale,
    low,
    up,
    bias,
    y,
    kernel,
    planes,
    scales,
    swap,
    block,
    ends,
    act_grouped,
    accumulate,
):
    """codes (M, ...) int8, scale (segments or 1, M) fp32, weight (N, bytes), weight_scale (segments or 1, N)
    -> y (M, N).

    low (M, R) and up (N, R), or None; bias (N,) or None. `kernel`, `planes`, `scales`, `swap`, `block` and
    `ends` as in `plan.Gemm`. act_grouped: the activations' scales change with the group. accumulate: y is
    added to.
    """
    tokens, channels, row_bytes = codes.shape[0], weight.shape[0], weight.shape[1]
    if not tokens:
        return
    target = kernel_target(codes.device)
    rank = 0 if low is None else low.shape[1]
    problem = Problem(kernel, planes, scales, swap, tokens, channels, row_bytes, block)
    tile = gemm_tile(target, problem)
    if kernel.startswith("turing"):
        _turing(
            codes, scale, weight, weight_scale, low, up, bias, y, problem, tile, ends, act_grouped, accumulate
        )
        return
    if tile.gluon:
        if _fits_tma(codes) and _fits_tma(weight):
            _hopper(
                codes,
                scale,
                weight,
                weight_scale,
                low,
                up,
                bias,
                y,
                problem,
                tile,
                ends,
                act_grouped,
                accumulate,
            )
            return
        tile = candidates(target, problem)[0]
    empty = scale  # a pointer that is never read
    getattr(kernels, kernel)[(triton.cdiv(tokens, tile.bm) * triton.cdiv(channels, tile.bn),)](
        codes, weight, scale, weight_scale, _ends(ends, scales),
        empty if low is None else low, empty if up is None else up, empty if bias is None else bias, y,
        tokens, channels, row_bytes, rank, codes.stride(0), weight.stride(0), y.stride(0),
        *_segment_strides(scale, weight_scale, act_grouped or scales == SLICE),
        0 if low is None else low.stride(0), 0 if up is None else up.stride(0), codes.shape[1] // max(planes, 1),
        **constants(target, problem, tile, _exact(weight_scale), rank, bias is not None, accumulate), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _ends(ends, scales) -> tuple[int, ...]:
    return (*ends, *[-1] * (MAX_SLICES - len(ends))) if scales == SLICE else (-1,) * MAX_SLICES


def _segment_strides(scale, weight_scale, act_segmented) -> tuple[int, int]:
    """From a segment's scales to the next's; 0 where one scale serves all."""
    return scale.stride(0) if act_segmented else 0, weight_scale.stride(0) if weight_scale.shape[0] > 1 else 0


def _exact(weight_scale) -> bool:
    """Whether 1.5 * 2^23 times a scale is exact in fp32."""
    return weight_scale.dtype in (torch.bfloat16, torch.float16)


def _turing(
    codes, scale, weight, weight_scale, low, up, bias, y, problem, tile, ends, act_grouped, accumulate
):
    from .turing import gemm_m8n8k32

    x, w = codes.view(torch.int32), weight.view(torch.int32)
    gemm_m8n8k32[(triton.cdiv(problem.tokens, tile.bm), triton.cdiv(problem.channels, tile.bn))](
        x, w, scale, weight_scale, _ends(ends, problem.scales), scale if bias is None else bias, y,
        problem.tokens, problem.channels, problem.row_bytes, x.stride(0), w.stride(0), y.stride(0),
        *_segment_strides(scale, weight_scale, act_grouped or problem.scales == SLICE),
        **turing_constants(problem, tile, _exact(weight_scale), bias is not None, accumulate), num_warps=tile.warps,
    )  # fmt: skip
    if low is not None:  # Triton has no 16-bit tensor cores on this card, cuBLAS has
        y.addmm_(low, up.to(low.dtype).T)


def turing_constants(problem: Problem, tile: Tile, exact: bool, has_bias: bool, accumulate: bool) -> dict:
    """The same for Turing's kernel."""
    return {
        "UNSIGNED": problem.kernel == "turing_u4s4",
        "SCALES": problem.scales,
        "MAGIC": problem.scales == GROUP and exact,
        "HAS_BIAS": has_bias,
        "ACCUMULATE": accumulate,
        "MT": tile.bm // 16,
        "NT": tile.bn // 16,
        "WM": 2,
        "WN": 2,
    }


def _fits_tma(tensor) -> bool:
    """TMA reads rows that begin at multiples of 16 bytes."""
    return tensor.stride(-1) == 1 and not (tensor.data_ptr() | tensor.stride(0)) % 16


def _hopper(
    codes, scale, weight, weight_scale, low, up, bias, y, problem, tile, ends, act_grouped, accumulate
):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper import gemm_wgmma, tile_layout

    layout, rank = tile_layout(tile.bk), 0 if low is None else low.shape[1]
    gemm_wgmma[(triton.cdiv(problem.tokens, tile.bm) * triton.cdiv(problem.channels, tile.bn),)](
        TensorDescriptor.from_tensor(codes, [tile.bm, tile.bk], layout), TensorDescriptor.from_tensor(weight, [tile.bn, tile.bk], layout),
        scale, weight_scale, _ends(ends, problem.scales),
        scale if low is None else low, scale if up is None else up, scale if bias is None else bias, y,
        problem.tokens, problem.channels, problem.row_bytes, rank, y.stride(0),
        *_segment_strides(scale, weight_scale, act_grouped or problem.scales == SLICE),
        0 if low is None else low.stride(0), 0 if up is None else up.stride(0), codes.shape[1] // problem.planes,
        **hopper_constants(problem, tile, rank, bias is not None, accumulate), num_warps=tile.warps,
    )  # fmt: skip


def hopper_constants(problem: Problem, tile: Tile, rank: int, has_bias: bool, accumulate: bool) -> dict:
    """The same for Hopper's kernel in Gluon."""
    return {
        "PLANES": problem.planes,
        "SCALES": problem.scales,
        "HAS_BIAS": has_bias,
        "ACCUMULATE": accumulate,
        "BR": tile.rank_block if rank else 0,
        "GROUP_M": tile.group_m,
        "STAGES": tile.stages,
        "WARPS": tile.warps,
    }


def constants(
    target, problem: Problem, tile: Tile, exact: bool, rank: int, has_bias: bool, accumulate: bool
) -> dict:
    """The kernel's compile-time arguments. exact: the weight scales have 16 bits."""
    return {
        "PLANES": max(problem.planes, 1),
        "SCALES": problem.scales,
        "SWAP": problem.swap,
        "EVEN_K": problem.row_bytes % tile.bk == 0,
        "MAGIC": problem.scales == GROUP and exact,
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
