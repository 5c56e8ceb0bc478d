"""A block of in-channels of GPTQ: each row's rounding error is pushed into the rows behind it, in registers.

In torch a row is ten launches, 18 million for FLUX.1, minutes on any card; here a block of 128 is one. A
program holds the block for some out-channels, which do not know of each other. Division is IEEE division and
rounding to even, so that codes are those of the loop in torch but where a fused multiply-add moves a value
over an edge.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the integer nearest to v in the low bits
_TINY = tl.constexpr(1e-10)  # of `operator.quantizers`


@triton.jit
def _row(tile, here):
    """The one row of tile (B, BN) where `here` is set."""
    return tl.sum(tl.where(here[:, None], tile, 0.0), 0)


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
    B: tl.constexpr,
    BN: tl.constexpr,
):
    """w (COUNT, N) fp32, inverse (COUNT, COUNT or more) fp32 with any strides -> codes (COUNT, N) int8, error
    (COUNT, N) fp32.

    scale (groups, N): read where GIVEN, else written where a group of GROUP in-channels begins within the
    block; FIRST is the block's first in-channel. SMALLEST: of the scales' dtype.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, B)
    n_ok, inside = n < N, k < COUNT
    w = tl.load(w_ptr + k[:, None] * N + n[None, :], mask=inside[:, None] & n_ok[None, :], other=0.0)
    scale = tl.full((BN,), 1.0, tl.float32)
    for j in range(COUNT):
        group = (FIRST + j) // GROUP
        begins = (FIRST + j) % GROUP == 0
        if GIVEN:
            if begins | (j == 0):
                scale = tl.load(scale_ptr + group * N + n, mask=n_ok, other=1.0).to(tl.float32)
        else:
            if begins:
                of_group = (k >= j) & (k < j + GROUP)
                largest = tl.max(tl.where(of_group[:, None], tl.abs(w), 0.0), 0)
                exact = tl.div_rn(tl.maximum(largest, _TINY), tl.full((BN,), TOP, tl.float32))
                stored = tl.maximum(exact.to(scale_ptr.dtype.element_ty).to(tl.float32), SMALLEST)
                tl.store(scale_ptr + group * N + n, stored.to(scale_ptr.dtype.element_ty), mask=n_ok)
                scale = stored
        column = _row(w, k == j)
        code = (tl.div_rn(column, scale) + _ROUND) - _ROUND
        code = tl.minimum(tl.maximum(code, LOW), TOP)
        tl.store(codes_ptr + j * N + n, code.to(tl.int8), mask=n_ok)
        diagonal = tl.load(inverse_ptr + j * (row_inverse + column_inverse))
        error = tl.div_rn(column - code * scale, tl.broadcast_to(diagonal, (BN,)))
        tl.store(error_ptr + j * N + n, error, mask=n_ok)
        at = inverse_ptr + j * row_inverse + k * column_inverse
        behind = tl.load(at, mask=inside & (k > j), other=0.0)
        w -= behind[:, None] * error[None, :]
