"""Launches GPTQ's kernel."""

import torch
import triton

from ..operator import nvfp4
from ..operator.codes import NVFP4
from ..operator.quantizers import code_range
from ..target import Target, kernel_target
from .triton import gptq_block_kernel

BLOCK = 128  # in-channels: 128 x 8 values of fp32 are 32 registers a thread; with 128 x 16 sm_120 spills
# One warp: no row of the block is on another's side of a barrier.


def options(given: bool, grid: str) -> dict[str, int]:
    """How the kernel is compiled."""
    return {"num_warps": 2 if grid == NVFP4 and not given else 1, "num_stages": 1}


def block(
    columns: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    first: int,
    group: int,
    bits: int,
    given: bool,
    grid: str,
) -> None:
    """One block of `methods.gptq.quantize`: columns (B, N) fp32, at most 128 of them, and inverse (B, >= B)
    fp32 of which the upper triangle is read -> codes (B, N) int8 and errors (B, N) fp32. All but `inverse`
    are contiguous.

    scales (G, N): read where `given`, else made at the block's groups, which may not reach out of it. first:
    the in-channel of the block's first row. grid: of the codes.
    """
    count, channels = columns.shape
    chosen = constants(kernel_target(columns.device), bits, given, grid)
    with torch.cuda.device_of(columns):
        gptq_block_kernel[(triton.cdiv(channels, chosen["BN"]),)](
            columns,
            inverse,
            scales,
            codes,
            errors,
            channels,
            count,
            first,
            group,
            *inverse.stride(),
            torch.finfo(scales.dtype).tiny,
            **chosen,
            **options(given, grid),
        )


def constants(target: Target, bits: int, given: bool, grid: str) -> dict:
    """The kernel's compile-time arguments."""
    low, top = (-nvfp4.TOP, nvfp4.TOP) if grid == NVFP4 else code_range(bits)
    wide = 16 if target.card.waves_of_64 else 8  # AMD's waves of 64 hold twice as much
    if (
        grid == NVFP4 and not given
    ):  # its search of scales takes more registers: on sm_120 8 spilled 63, with two warps 36
        wide //= 2
    return {"LOW": low, "TOP": top, "GIVEN": given, "E2M1": grid == NVFP4, "B": BLOCK, "BN": wide}
