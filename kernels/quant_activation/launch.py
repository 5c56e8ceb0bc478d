"""Launches the activation quantizer. Writes into buffers that the caller owns."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..operator.quantizers import code_range
from ..target import Target, kernel_target
from ..tuning import kronecker_tile, quantizer_tile
from .kronecker import quantize_kronecker_kernel
from .triton import quantize_kernel

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def quantize_activation(
    x, codes, scale, low, smooth, down, mod_scale, mod_shift, width, count, planes, bits, unsigned, grouped,
    rotation, shift, clip, prologue, eps, principal=0
):  # fmt: skip
    """x (M, count * width) 16 bit, rows apart by any stride -> codes (M, ...) int8, scale (segments, M) fp32,
    low (M, count * R).

    codes may be the right part of a wider buffer; its planes are as far apart as that buffer's rows are long,
    over `planes`. principal: so many columns of each part's `down` take their share out of x; `low` is then
    read, not written. smooth (count * width,) or None, down (count * width, R) or None. planes: 0 packed
    nibbles; 1, 2 or 4 planes of int8. mod_scale, mod_shift (batches, count * width): the modulation after a
    LayerNorm, x having M / batches tokens each.
    """
    tokens = x.shape[0]
    if not tokens:
        return
    rank = 0 if down is None else down.shape[1]
    rows, chosen = _chosen(
        kernel_target(x.device).fields, x.dtype, 0 if principal else rank, rotation, prologue,
        smooth is not None, grouped, bits, unsigned, planes, shift, principal,
    )  # fmt: skip
    empty = scale  # a pointer that is never read
    batches = mod_scale.shape[0] if mod_scale is not None else 1
    quantize_kernel[(-(-tokens // rows), count)](
        x,
        smooth if smooth is not None else empty,
        down if down is not None else empty,
        mod_scale if mod_scale is not None else empty,
        mod_shift if mod_shift is not None else empty,
        codes, scale, low if low is not None else empty,
        tokens, width, count * width, rank, principal, tokens // batches, x.stride(0), codes.stride(0),
        codes.stride(0) // max(planes, 1),
        down.stride(0) if down is not None else 0,
        low.stride(0) if low is not None else 0,
        mod_scale.stride(0) if mod_scale is not None else 0,
        shift, clip, eps,
        **chosen,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _chosen(target, dtype, rank, rotation, *settings):
    """(tokens a block, the kernel's compile-time arguments with the numbers of warps and stages)."""
    target = Target(*target)
    tile = quantizer_tile(target, rank, rotation)
    made = constants(target, tile, dtype, rank, rotation, *settings)
    return tile.rows, made | {"num_warps": tile.warps, "num_stages": tile.stages}


def quantize_kronecker(
    x, codes, scale, smooth, factors, mod_scale, mod_shift, count, slices, p1, p2, per_slice, planes, bits,
    unsigned, clip, prologue, eps
):  # fmt: skip
    """As `quantize_activation` for `count` parts of slices p1 p2 channels each, one scale a token and part.
    factors: flat, part by part."""
    tokens = x.shape[0]
    if not tokens:
        return
    rows, chosen = _chosen_kronecker(
        kernel_target(x.device).fields, p1, p2, slices, per_slice, prologue, smooth is not None, bits,
        unsigned,
        planes,
    )  # fmt: skip
    empty = scale  # a pointer that is never read
    quantize_kronecker_kernel[(-(-tokens // rows), count)](
        x, smooth if smooth is not None else empty, factors,
        mod_scale if mod_scale is not None else empty,
        mod_shift if mod_shift is not None else empty,
        codes, scale, tokens, tokens // (mod_scale.shape[0] if mod_scale is not None else 1),
        x.stride(0), codes.stride(0), codes.stride(0) // max(planes, 1),
        mod_scale.stride(0) if mod_scale is not None else 0, clip, eps,
        **chosen,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _chosen_kronecker(target, p1, p2, slices, per_slice, *settings):
    """As `_chosen`."""
    target = Target(*target)
    tile = kronecker_tile(target, p1, p2, slices, per_slice)
    made = kronecker_constants(target, tile, p1, p2, slices, per_slice, *settings)
    return tile.rows, made | {"num_warps": tile.warps, "num_stages": 1}


def kronecker_constants(
    target, tile, p1, p2, slices, per_slice, prologue, smooth, bits, unsigned, planes
) -> dict:
    """The kernel's compile-time arguments."""
    return {
        "PROLOGUE": prologue,
        "SMOOTH": smooth,
        "PER_SLICE": per_slice,
        "BATCHED": tile.batched,
        "P1": p1,
        "P2": p2,
        "COUNT": slices,
        **_code_constants(bits, unsigned, planes),
        "BM": tile.rows,
        "PAD1": tile.sides[0],
        "PAD2": tile.sides[1],
        "SLICES": tile.slices,
        "UPCAST": target.interpreted,
    }


def _code_constants(bits, unsigned, planes):
    return {"TOP": code_range(bits, unsigned)[1], "SIGN": bits == 1, "UNSIGNED": unsigned, "LAYOUT": planes}


def constants(
    target,
    tile,
    dtype,
    rank,
    rotation,
    prologue,
    smooth,
    grouped,
    bits,
    unsigned,
    planes,
    shift=0.0,
    principal=0,
) -> dict:
    """The kernel's compile-time arguments."""
    return {
        "PROLOGUE": prologue,
        "SMOOTH": smooth,
        "ROTATION": rotation,
        # A smoothed value may leave the range of fp16; x itself is exact in its own dtype.
        "ROT_DTYPE": _TL[target.matrix_dtype if smooth or shift else dtype],
        "GROUPED": grouped,
        **_code_constants(bits, unsigned, planes),
        "RP": max(16, triton.next_power_of_2(rank)) if rank else 0,
        "PP": max(16, triton.next_power_of_2(principal)) if principal else 0,
        "BM": tile.rows,
        "TILES": max(rotation // 64, 1) if rotation else tile.tiles,
        "ASM": target.backend == "cuda",
        "UPCAST": target.interpreted,
    }
