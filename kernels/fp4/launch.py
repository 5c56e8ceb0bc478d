"""Launches the fp4 kernels. They write into buffers that the caller owns."""

from functools import lru_cache

import torch
import triton

from ..quant_activation.launch import constants as integer_constants
from ..target import Target, kernel_target
from ..tuning import QuantizerTile, Tile, low_rank_limit
from . import refused
from . import triton as kernels

# Defaults, not measured on a card: the first for many tokens, the last for up to 64. Larger ones spill with
# one Triton or another: 256 out-channels with nvfp4 on sm_100, 256 channels a step of 128 x 128 on sm_120.
# tcgen05 scales products of 128 tokens only.
TILES = {
    "tcgen05": (
        Tile(
            128,
            128,
            128,
            8,
            4,
        ),
        Tile(
            128,
            128,
            64,
            8,
            4,
        ),
        Tile(
            128,
            64,
            128,
            8,
            4,
        ),
    ),
    "mma": (
        Tile(
            128,
            128,
            64,
            8,
            4,
        ),
        Tile(
            64,
            128,
            64,
            4,
            3,
        ),
        Tile(
            64,
            64,
            128,
            4,
            3,
        ),
    ),
}


def quantizer_tile(rank: int, rotation: int) -> QuantizerTile:
    """16 values a thread: with 32 the exact divisions spill. Two stages, with which RTX 5090 is modelled at
    44 in place of 55 us, but for a rank of 64 beside H256, which sm_100 has registers for with one."""
    return QuantizerTile(16, 2, stages=1 if rank > 32 and rotation > 128 else 2)


def tiles(target) -> tuple[Tile, ...]:
    """Tiles of a target's kind of tensor cores; `bk` in bytes, two channels each."""
    return TILES["tcgen05" if target.card.tcgen05 else "mma"]


def quantize_fp4(
    x, codes, scale, token_scale, low, smooth, down, tensor_scale, mod_scale=None, mod_shift=None, rotation=0,
    either=False, prologue=0, eps=0.0, principal=0,
):  # fmt: skip
    """x (M, K) 16 bit, rows apart by any stride -> codes (M, K / 2) uint8, scale (M, K / block) of its
    format's dtype, token_scale (M,) fp32, low (M, R) = x @ down.

    smooth (K,): x is divided by it, or None. down (K, R) or None. tensor_scale (1,): of nvfp4, given; None:
    one for each token. either: of nvfp4, the better of two scales a block. The rest is as in
    `quant_activation.launch`.
    """
    target = kernel_target(x.device)
    block = _block(target, x.shape[1], codes, scale)
    if tensor_scale is not None and block == 32:
        raise ValueError("mxfp4 has no scale of the tensor")
    if either and (block == 32 or tensor_scale is not None):
        raise ValueError("either of two scales goes with nvfp4 and a scale for each token")
    tokens, width = x.shape
    if not tokens:
        return
    rank = 0 if down is None else down.shape[1]
    if not principal and rank > low_rank_limit(target, rotation):  # too many columns to hold beside the codes
        torch.mm(x, down.to(x.dtype), out=low)
        rank = 0
    level = 0 if block == 32 else 1 if tensor_scale is not None else 2
    rows, chosen = _quantizer(
        target.fields, x.dtype, level, block, either, 0 if principal else rank, rotation, prologue,
        smooth is not None, principal,
    )  # fmt: skip
    empty = token_scale  # a pointer that is never read
    given = lambda tensor: empty if tensor is None else tensor
    branch = rank or principal
    batches = 1 if mod_scale is None else mod_scale.shape[0]
    kernels.quantize_fp4_kernel[(triton.cdiv(tokens, rows),)](
        x,
        given(smooth),
        down if branch else empty,
        given(mod_scale),
        given(mod_shift),
        given(tensor_scale),
        codes.view(torch.int8),
        scale.view(torch.uint8),
        token_scale,
        low if branch else empty,
        tokens,
        width,
        rank,
        principal,
        tokens // batches,
        x.stride(0),
        codes.stride(0),
        scale.stride(0),
        down.stride(0) if branch else 0,
        low.stride(0) if branch else 0,
        0 if mod_scale is None else mod_scale.stride(0),
        eps,
        **chosen,
    )


@lru_cache(maxsize=1024)
def _quantizer(target, dtype, level, block, either, rank, rotation, *settings):
    """(tokens a block, the kernel's compile-time arguments with the numbers of warps and stages)."""
    target, tile = Target(*target), quantizer_tile(rank, rotation)
    made = quantizer_constants(
        target,
        tile,
        dtype,
        level,
        block,
        either,
        rank,
        rotation,
        *settings,
    )
    return tile.rows, made | {"num_warps": tile.warps, "num_stages": tile.stages}


def gemm_fp4(
    codes, scale, token_scale, weight, weight_scale, tensor_scale, low, up, bias, y, accumulate=False
):
    """codes (M, K / 2), scale (M, K / block), token_scale (M,), weight (N, K / 2), weight_scale (N, K /
    block) -> y (M, N).

    tensor_scale: fp32 of the weight, one or (N,), or None. low (M, R) and up (N, R), or None; bias (N,) or
    None. accumulate: y is added to.
    """
    target = kernel_target(codes.device)
    width = 2 * codes.shape[1]
    block = _block(target, width, codes, scale)
    if _block(target, width, weight, weight_scale) != block:
        raise ValueError("the activations are in one fp4 format, the weight in the other")
    tokens, channels = codes.shape[0], weight.shape[0]
    if not tokens:
        return
    rank = 0 if low is None else low.shape[1]
    tile = gemm_tile(target, tokens)
    empty = token_scale  # a pointer that is never read
    kernels.gemm_fp4_kernel[(triton.cdiv(tokens, tile.bm) * triton.cdiv(channels, tile.bn),)](
        codes,
        weight,
        scale.view(torch.uint8),
        weight_scale.view(torch.uint8),
        token_scale,
        empty if tensor_scale is None else tensor_scale,
        empty if low is None else low,
        empty if up is None else up,
        empty if bias is None else bias,
        y,
        tokens,
        channels,
        width // 2,
        rank,
        codes.stride(0),
        weight.stride(0),
        scale.stride(0),
        weight_scale.stride(0),
        y.stride(0),
        0 if tensor_scale is None or tensor_scale.numel() == 1 else tensor_scale.stride(0),
        0 if low is None else low.stride(0),
        0 if up is None else up.stride(0),
        **constants(
            target, tile, block, width // 2, rank, tensor_scale is not None, bias is not None, accumulate
        ),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def gemm_tile(target, tokens: int) -> Tile:
    if target.interpreted:  # small, so that tests on small shapes cross tile borders
        return Tile(
            32,
            32,
            64,
            4,
            1,
            group_m=2,
            rank_block=16,
        )
    return tiles(target)[-1 if tokens <= 64 else 0]


def _block(target, width: int, codes, scale) -> int:
    """Channels a scale. Raises ValueError where the kernels do not run, or not on operands of this kind."""
    reason = refused(target)
    if reason:
        raise ValueError(f"fp4 products: {reason}")
    if width % 64:
        raise ValueError(f"fp4 products take in-channels in multiples of 64, not {width}")
    blocks = {torch.float8_e4m3fn: 16, torch.uint8: 32}
    if scale.dtype not in blocks:
        raise ValueError(f"scales of fp4 are float8_e4m3fn (nvfp4) or uint8 (mxfp4), not {scale.dtype}")
    block = blocks[scale.dtype]
    wanted = (codes.shape[0], width // 2), (codes.shape[0], width // block)
    if (tuple(codes.shape), tuple(scale.shape)) != wanted or codes.dtype != torch.uint8:
        raise ValueError(
            f"{width} channels of fp4 with one scale per {block} need uint8 codes {wanted[0]} and scales "
            f"{wanted[1]}"
        )
    return block


def quantizer_constants(
    target, tile, dtype, level, block, either, rank, rotation, prologue, smooth, principal
) -> dict:
    """The quantizer's compile-time arguments."""
    integer = integer_constants(
        target, tile, dtype, rank, rotation, prologue, smooth, False, 4, False, 0, 0.0, principal
    )
    shared = ("PROLOGUE", "SMOOTH", "ROTATION", "ROT_DTYPE", "RP", "PP", "BM", "TILES", "ASM", "UPCAST")
    return {"LEVEL": level, "BLOCK": block, "EITHER": either} | {name: integer[name] for name in shared}


def constants(
    target,
    tile,
    block: int,
    row_bytes: int,
    rank: int,
    tensor_scale: bool,
    bias: bool,
    accumulate: bool = False,
) -> dict:
    """The product's compile-time arguments."""
    return {
        "BLOCK": block,
        "EVEN_K": row_bytes % tile.bk == 0,
        "HAS_TW": tensor_scale,
        "HAS_BIAS": bias,
        "ACCUMULATE": accumulate,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "BR": tile.rank_block if rank else 0,
        "GROUP_M": tile.group_m,
        "UPCAST": target.interpreted,
    }
