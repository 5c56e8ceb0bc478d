"""A block of in-channels of GPTQ: each row's rounding error is pushed into the rows behind it, in registers.

In torch a row is ten launches, 18 million for FLUX.1, minutes on any card; here a block of 128 is one. A
program holds the block for some out-channels, which do not know of each other. Division is IEEE division and
rounding to even, so that codes are those of the loop in torch but where a fused multiply-add moves a value
over an edge.
"""

import triton
import triton.language as tl

from .search import FRACTIONS, NVFP4_FRACTIONS

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the integer nearest to v in the low bits
_TINY = tl.constexpr(1e-10)  # of `operator.quantizers`
_TRIES, _E2M1_TRIES = tl.constexpr(len(FRACTIONS)), tl.constexpr(len(NVFP4_FRACTIONS))
_FIRST, _E2M1_FIRST = tl.constexpr(FRACTIONS[0]), tl.constexpr(NVFP4_FRACTIONS[0])
_STEP = tl.constexpr(FRACTIONS[0] - FRACTIONS[1])
_E2M1_STEP = tl.constexpr(NVFP4_FRACTIONS[0] - NVFP4_FRACTIONS[1])


@triton.jit
def _row(tile, here):
    """The one row of tile (B, BN) where `here` is set."""
    return tl.sum(tl.where(here[:, None], tile, 0.0), 0)


@triton.jit
def _codes(w, scale, LOW: tl.constexpr, TOP: tl.constexpr, E2M1: tl.constexpr):
    """Whole numbers; with E2M1 the doubled values of `operator.nvfp4`: every one up to 4, every second up to
    8, then 12."""
    code = tl.div_rn(w, scale)
    if E2M1:
        large = tl.abs(code)
        step = tl.where(large < 4.0, 1.0, tl.where(large < 8.0, 2.0, 4.0))
        inverse = tl.where(large < 4.0, 1.0, tl.where(large < 8.0, 0.5, 0.25))
        code = ((code * inverse + _ROUND) - _ROUND) * step
    else:
        code = (code + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(code, LOW), TOP)


@triton.jit
def _stored(scale, stored_ptr, E2M1: tl.constexpr):
    """A scale rounded to the dtype of stored_ptr; with E2M1 to the mantissa of e4m3, three bits."""
    if E2M1:
        bits = scale.to(tl.int32, bitcast=True)
        bits = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) << 20
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale = scale.to(stored_ptr.dtype.element_ty).to(tl.float32)
    return scale


@triton.jit
def _searched(
    w, of_group, diagonal, stored_ptr, SMALLEST, LOW: tl.constexpr, TOP: tl.constexpr, E2M1: tl.constexpr
):
    """The scale (BN,) of the rows `of_group` of w (B, BN) with the least error, a row's divided by its
    diagonal; see `methods.gptq._searched`. stored_ptr: of the dtype that it is rounded to."""
    TRIES: tl.constexpr = _E2M1_TRIES if E2M1 else _TRIES
    FIRST: tl.constexpr = _E2M1_FIRST if E2M1 else _FIRST
    STEP: tl.constexpr = _E2M1_STEP if E2M1 else _STEP
    largest = tl.max(tl.where(of_group[:, None], tl.abs(w), 0.0), 0)
    largest = tl.div_rn(tl.maximum(largest, _TINY), tl.full(largest.shape, TOP, tl.float32))
    best = tl.zeros_like(largest)
    least = tl.full(largest.shape, float("inf"), tl.float32)
    for i in tl.static_range(TRIES):
        stored = _stored(largest * (FIRST - STEP * i), stored_ptr, E2M1)
        stored = tl.maximum(stored, SMALLEST)
        wide = tl.broadcast_to(stored[None, :], w.shape)
        rest = tl.div_rn(
            _codes(w, wide, LOW, TOP, E2M1) * wide - w, tl.broadcast_to(diagonal[:, None], w.shape)
        )
        error = tl.sum(tl.where(of_group[:, None], rest * rest, 0.0), 0)
        # The first is taken whatever its error is, as NaN is below nothing.
        better = (error < least) | (i == 0)
        best = tl.where(better, stored, best)
        least = tl.where(better, error, least)
    return best


@triton.jit
def gptq_block_kernel(
    w_ptr,
    inverse_ptr,
    scale_ptr,
    codes_ptr,
    error_ptr,
    N,
    COUNT,
    FIRST,
    GROUP,
    row_inverse,
    column_inverse,
    SMALLEST,
    LOW: tl.constexpr,
    TOP: tl.constexpr,
    GIVEN: tl.constexpr,
    E2M1: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
):
    """w (COUNT, N) fp32, inverse (COUNT, COUNT or more) fp32 with any strides -> codes (COUNT, N) int8, error
    (COUNT, N) fp32.

    scale (groups, N): read where GIVEN, else written where a group of GROUP in-channels begins within the
    block; FIRST is the block's first in-channel. SMALLEST: of the scales' dtype. E2M1: codes and scales are
    those of `operator.nvfp4`.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, B)
    n_ok, inside = n < N, k < COUNT
    w = tl.load(w_ptr + k[:, None] * N + n[None, :], mask=inside[:, None] & n_ok[None, :], other=0.0)
    scale = tl.full((BN,), 1.0, tl.float32)
    diagonals = tl.load(inverse_ptr + k * (row_inverse + column_inverse), mask=inside, other=1.0)
    for j in range(COUNT):
        group = (FIRST + j) // GROUP
        begins = (FIRST + j) % GROUP == 0
        if GIVEN:
            if begins | (j == 0):
                scale = tl.load(scale_ptr + group * N + n, mask=n_ok, other=1.0).to(tl.float32)
        else:
            if begins:
                of_group = (k >= j) & (k < j + GROUP)
                scale = _searched(w, of_group, diagonals, scale_ptr, SMALLEST, LOW, TOP, E2M1)
                tl.store(scale_ptr + group * N + n, scale.to(scale_ptr.dtype.element_ty), mask=n_ok)
        column = _row(w, k == j)
        code = _codes(column, scale, LOW, TOP, E2M1)
        tl.store(codes_ptr + j * N + n, code.to(tl.int8), mask=n_ok)
        diagonal = tl.load(inverse_ptr + j * (row_inverse + column_inverse))
        error = tl.div_rn(column - code * scale, tl.broadcast_to(diagonal, (BN,)))
        tl.store(error_ptr + j * N + n, error, mask=n_ok)
        at = inverse_ptr + j * row_inverse + k * column_inverse
        behind = tl.load(at, mask=inside & (k > j), other=0.0)
        w -= behind[:, None] * error[None, :]
