"""Launches the quantized matrix product."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from .. import tuning
from ..plan import GROUP, MAX_SLICES, SLICE
from ..target import Target, kernel_target
from ..tuning import Problem, Tile, candidates, gemm_tile
from . import triton as kernels


def gemm(
    codes, scale, weight, weight_scale, low, up, bias, y,
    kernel, planes, scales, swap, block, ends, act_grouped, accumulate,
):  # fmt: skip
    """codes (M, ...) int8, scale (segments or 1, M) fp32, weight (N, bytes), weight_scale (segments or 1, N)
    -> y (M, N).

    low (M, R) and up (N, R), or None; bias (N,) or None. `kernel`, `planes`, `scales`, `swap`, `block` and
    `ends` as in `plan.Gemm`. act_grouped: the activations' scales change with the group. accumulate: y is
    added to.
    """
    (tokens, width), (channels, row_bytes) = codes.shape, weight.shape
    if not tokens:
        return
    rank = 0 if low is None else low.shape[1]
    chosen = _chosen(
        kernel_target(codes.device).fields, tuning.changes, kernel, planes, scales, swap, block, ends,
        tokens, channels, row_bytes, weight_scale.dtype, rank, bias is not None, accumulate,
    )  # fmt: skip
    # From a segment's scales to the next's; 0 where one serves all.
    act_stride = scale.stride(0) if act_grouped or scales == SLICE else 0
    strides = act_stride, weight_scale.stride(0) if weight_scale.shape[0] > 1 else 0
    if chosen.turing:
        _turing(codes, scale, weight, weight_scale, low, up, bias, y, chosen, strides)
        return
    empty = scale  # a pointer that is never read
    branch = empty if low is None else low, empty if up is None else up, empty if bias is None else bias, y
    low_strides = 0 if low is None else low.stride(0), 0 if up is None else up.stride(0)
    plane = width // max(planes, 1)
    if chosen.ampere and not (_fits_tma(codes) and _fits_tma(weight) and _fits_tma(weight_scale)):
        chosen = chosen.without_gluon
    elif chosen.gluon:
        if _fits_tma(codes) and _fits_tma(weight):
            sizes = tokens, channels, row_bytes, rank, y.stride(0)
            _hopper(
                codes, scale, weight, weight_scale, branch, chosen, (*sizes, *strides, *low_strides, plane)
            )
            return
        chosen = chosen.without_gluon
    chosen.kernel[chosen.grid](
        codes, weight, scale, weight_scale, chosen.ends, *branch,
        tokens, channels, row_bytes, rank, codes.stride(0), weight.stride(0), y.stride(0), *strides,
        *low_strides, plane,
        **chosen.constants,
    )  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """A kernel with all that does not change from call to call: its grid, the ends of the slices, and its
    compile-time arguments with the numbers of warps and stages.

    turing, gluon, ampere: for the kernels of those cards. tile: of the product. without_gluon: what runs in
    place of Hopper's and Ampere's kernels where they cannot read x, the weight or its scales.
    """

    kernel: object
    grid: tuple[int, ...]
    ends: tuple[int, ...]
    constants: dict
    tile: Tile
    turing: bool = False
    gluon: bool = False
    ampere: bool = False
    without_gluon: "Chosen | None" = None


@lru_cache(maxsize=4096)
def _chosen(
    target,
    changes,
    kernel,
    planes,
    scales,
    swap,
    block,
    ends,
    tokens,
    channels,
    row_bytes,
    scale_dtype,
    rank,
    has_bias,
    accumulate,
):
    """changes: `tuning.changes`, so that a tile which was just timed is taken at once."""
    target = Target(*target)
    problem = Problem(kernel, planes, scales, swap, tokens, channels, row_bytes, block)
    exact = scale_dtype in (torch.bfloat16, torch.float16)  # 1.5 * 2^23 times such a scale is exact in fp32

    def of(tile):
        rows, columns = triton.cdiv(tokens, tile.bm), triton.cdiv(channels, tile.bn)
        grid, warps = (rows * columns,), {"num_warps": tile.warps}
        if kernel.startswith("turing"):
            from .turing import gemm_m8n8k32

            made = turing_constants(problem, tile, exact, has_bias, accumulate) | warps
            return Chosen(gemm_m8n8k32, (rows, columns), _ends(ends, scales), made, tile, turing=True)
        if tile.gluon and target.card.int4:
            from . import ampere

            made = ampere_constants(problem, tile, exact, rank, has_bias, accumulate) | warps
            plain = of(next(t for t in candidates(target, problem) if not t.gluon))
            name = kernel.replace("gemm", "ampere")
            return Chosen(
                getattr(ampere, name), grid, _ends((), 0), made, tile, ampere=True, without_gluon=plain
            )
        if tile.gluon:
            from .hopper import gemm_wgmma

            made = hopper_constants(problem, tile, rank, has_bias, accumulate) | warps
            plain = of(candidates(target, problem)[0])
            return Chosen(gemm_wgmma, grid, _ends(ends, scales), made, tile, gluon=True, without_gluon=plain)
        made = constants(target, problem, tile, exact, rank, has_bias, accumulate) | warps
        made["num_stages"] = tile.stages
        return Chosen(getattr(kernels, kernel), grid, _ends(ends, scales), made, tile)

    return of(gemm_tile(target, problem))


def _ends(ends, scales) -> tuple[int, ...]:
    return (*ends, *[-1] * (MAX_SLICES - len(ends))) if scales == SLICE else (-1,) * MAX_SLICES


def _turing(codes, scale, weight, weight_scale, low, up, bias, y, chosen, strides):
    (tokens, _), (channels, row_bytes) = codes.shape, weight.shape
    x, w = codes.view(torch.int32), weight.view(torch.int32)
    chosen.kernel[chosen.grid](
        x,
        w,
        scale,
        weight_scale,
        chosen.ends,
        scale if bias is None else bias,
        y,
        tokens,
        channels,
        row_bytes,
        x.stride(0),
        w.stride(0),
        y.stride(0),
        *strides,
        **chosen.constants,
    )
    if low is not None:  # Triton has no 16-bit tensor cores on this card, cuBLAS has
        # y is fp32 where a layer takes several launches, and torch multiplies no two types.
        y.addmm_(low.to(y.dtype), up.to(y.dtype).T)


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
    """Rows begin at multiples of 16 bytes and of 16 elements, as TMA and copies of 16 bytes read them."""
    return tensor.stride(-1) == 1 and not (tensor.data_ptr() | tensor.stride(0)) % 16


def _hopper(codes, scale, weight, weight_scale, branch, chosen, sizes):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper import tile_layout

    tile, layout = chosen.tile, tile_layout(chosen.tile.bk)
    chosen.kernel[chosen.grid](
        TensorDescriptor.from_tensor(codes, [tile.bm, tile.bk], layout),
        TensorDescriptor.from_tensor(weight, [tile.bn, tile.bk], layout),
        scale,
        weight_scale,
        chosen.ends,
        *branch,
        *sizes,
        **chosen.constants,
    )


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


def ampere_constants(
    problem: Problem, tile: Tile, exact: bool, rank: int, has_bias: bool, accumulate: bool
) -> dict:
    """The same for the kernel of sm_80 to sm_89 in Gluon: two warps of 64 rows by as many as there are left.
    Its chunks give a warp 16 columns, which one ldmatrix reads; longer ones spill where y is added to."""
    columns = tile.warps // 2
    return {
        "SCALES": problem.scales,
        "MAGIC": problem.scales == GROUP and exact,
        "HAS_BIAS": has_bias,
        "ACCUMULATE": accumulate,
        "BM": tile.bm,
        "BN": tile.bn,
        "BR": tile.rank_block if rank else 0,
        "GROUP_M": tile.group_m,
        "G": tile.bk // 32,
        "STAGES": tile.stages,
        "WM": 2,
        "WN": columns,
        "NC": 16 * columns,
    }


def constants(
    target, problem: Problem, tile: Tile, exact: bool, rank: int, has_bias: bool, accumulate: bool
) -> dict:
    """The kernel's compile-time arguments. exact: the weight scales have 16 bits."""
    # 32 columns of the low rank with a mask spill on Hopper.
    columns = tile.rank_block if rank % tile.rank_block == 0 else 16
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
        "BR": columns if rank else 0,
        "EVEN_R": rank % columns == 0,
        "GROUP_M": tile.group_m,
        "ASM": target.backend == "cuda",
        "UPCAST": target.interpreted,
    }
