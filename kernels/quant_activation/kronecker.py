"""The activation quantizer of layers with a learned Kronecker transform: smooth, transform and quantize in
one pass over x.

One program takes a few tokens one after another. A token is a tile of its slices' rows, (slices p1, p2), each
size padded to a power of two, the sides to 16 at least; P1^T (x / s) P2 is two `tl.dot` with each slice
transposed in front of either. The scale needs the largest |z| of the whole row, so the row stays in
registers, 32 fp32 a thread: x is read once and transformed once. The two other ways cost more. For 3072
channels as four slices of 24 x 32 and 4608 tokens, quantizing moves 35 MB (35 us on an RTX 4090) and the
padded products are 2.4 GFLOP (15 us). To transform again in a second pass would double the products: 29 us,
and for 12288 channels as four slices of 48 x 64 they would take 234 us, the memory 140. To write z as bf16
and read it back would move 92 MB instead of 35.

The products take fp16 with fp32 sums. fp16 has the 11 bits of tf32 at twice its rate; its range is no limit,
since a token's x / s and each factor are multiplied by powers of two that bring their largest element to 2^7
.. 2^8 and to 1/2 .. 1: sums of 128 products stay below 2^15. Of 4-bit codes 0.06 % differ from the fp32
specification by a step, of 8-bit codes 1 %. (When torch transforms in fp32 and hands on bf16, it is 0.3 % of
4-bit codes, with bf16 in these products 0.45 %.)

The low-rank branch is not in here: its product wants 16 tokens at a time (alone, a token would read all of
proj_down, 196 kB at rank 32, for 6 kB of x), and 288 programs of 16 tokens would leave most of a card idle
where 1152 of 4 fill it. It reads x once more, mostly from L2.
"""

import triton
import triton.language as tl

from .triton import LAYERNORM, _dot, _prologue, _rounded, _scale_of, _store_codes


@triton.jit
def _powers(bits, EXPONENT: tl.constexpr):
    """2^n and 2^-n such that n brings the fp32 value of these bits to the biased exponent EXPONENT. Both are
    normal numbers."""
    e = tl.minimum(tl.maximum(bits >> 23, 8), 252)
    up = ((EXPONENT + 127 - e) << 23).to(tl.float32, bitcast=True)
    return up, ((e + 127 - EXPONENT) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(v):
    """The largest |v| by its bits as integers, which order as |v| does and put NaN on top."""
    return tl.max(tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)


@triton.jit
def _factors(
    f_ptr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    COUNT: tl.constexpr,
    STRIDE: tl.constexpr,
    COPIES: tl.constexpr,
):
    """COPIES factors (SIZE, SIZE), STRIDE apart, the first COUNT of them real, one under the other: (COPIES
    PADDED, PADDED) fp16.

    Their largest element comes to 1/2 .. 1; what undoes that is returned beside them.
    """
    row = tl.arange(0, COPIES * PADDED)
    i = row % PADDED
    j = tl.arange(0, PADDED)
    at = (row // PADDED) * STRIDE + i * SIZE
    ok = ((i < SIZE) & (row // PADDED < COUNT))[:, None] & (j < SIZE)[None, :]
    f = tl.load(f_ptr + at[:, None] + j[None, :], mask=ok, other=0.0).to(tl.float32)
    up, down = _powers(_largest(f), 126)
    return (f * up).to(tl.float16), down


@triton.jit
def _times(x, f, SLICES: tl.constexpr, BATCHED: tl.constexpr, UPCAST: tl.constexpr):
    """Slices (SLICES R, C) times f (C, C), or BATCHED each times its own of f (SLICES C, C), in fp32."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if BATCHED:
        stacked = tl.zeros((SLICES, ROWS // SLICES, COLUMNS), dtype=tl.float32)
        stacked = _dot(
            tl.reshape(x, stacked.shape), tl.reshape(f, (SLICES, COLUMNS, COLUMNS)), stacked, UPCAST
        )
        y = tl.reshape(stacked, (ROWS, COLUMNS))
    else:
        y = _dot(x, f, tl.zeros((ROWS, COLUMNS), dtype=tl.float32), UPCAST)
    return y


@triton.jit
def _turned(x, SLICES: tl.constexpr):
    """Each slice transposed: (SLICES R, C) -> (SLICES C, R)."""
    ROWS: tl.constexpr = x.shape[0] // SLICES
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (SLICES, ROWS, COLUMNS)), (0, 2, 1)), (SLICES * COLUMNS, ROWS))


@triton.jit
def quantize_kronecker_kernel(
    x_ptr, smooth_ptr, factor_ptr, mod_scale_ptr, mod_shift_ptr, q_ptr, s_ptr, M, tokens, ldx, ldq, plane,
    ld_mod, clip, eps,
    PROLOGUE: tl.constexpr, SMOOTH: tl.constexpr, PER_SLICE: tl.constexpr, BATCHED: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr,
    COUNT: tl.constexpr, TOP: tl.constexpr, SIGN: tl.constexpr, UNSIGNED: tl.constexpr, LAYOUT: tl.constexpr,
    BM: tl.constexpr, PAD1: tl.constexpr,
    PAD2: tl.constexpr, SLICES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of BM tokens. Axis 1: parts of K = COUNT P1 P2 channels with factors of their own.

    x (M, parts K) 16 bit; smooth (parts K,); factors (parts, pairs, P1 P1 + P2 P2), one pair or with
    PER_SLICE one a slice; modulation (batches, K), one part, `tokens` rows of x a batch. q (M, ...) codes; s
    (parts, M) fp32. PAD1, PAD2, SLICES: powers of two from P1, P2 and COUNT on. BATCHED: a product a slice,
    not one for all.
    """
    K: tl.constexpr = COUNT * P1 * P2
    PAIR: tl.constexpr = P1 * P1 + P2 * P2
    part = tl.program_id(1)
    block = tl.program_id(0) * BM
    x_ptr += part * K
    smooth_ptr += part * K
    factor_ptr += part * PAIR * (COUNT if PER_SLICE else 1)
    q_ptr += part * K // (2 if LAYOUT == 0 else LAYOUT)
    row = tl.arange(0, SLICES * PAD1)
    column = tl.arange(0, PAD2)
    first = row // PAD1 * (P1 * P2) + row % PAD1 * P2  # channel of each row of the tile
    row_ok = (row % PAD1 < P1) & (row // PAD1 < COUNT)
    at = first[:, None] + column[None, :]
    ok = row_ok[:, None] & (column < P2)[None, :]
    COPIES: tl.constexpr = SLICES if BATCHED else 1
    STRIDE: tl.constexpr = PAIR if PER_SLICE else 0
    left, left_down = _factors(factor_ptr, P1, PAD1, COUNT, STRIDE, COPIES)
    right, right_down = _factors(factor_ptr + P1 * P1, P2, PAD2, COUNT, STRIDE, COPIES)
    down = left_down * right_down

    for i in range(tl.minimum(BM, M - block)):
        m = block + i
        x = tl.load(x_ptr + m.to(tl.int64) * ldx + at, mask=ok, other=0.0)
        mean = 0.0
        rstd = 0.0
        if PROLOGUE == LAYERNORM:
            mean = tl.sum(tl.sum(x.to(tl.float32), axis=1), axis=0) / K
            off = tl.where(ok, x.to(tl.float32) - mean, 0.0)
            rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(off * off, axis=1), axis=0) / K + eps)
        mod_at = (m // tokens) * ld_mod + at
        v = _prologue(x, mod_scale_ptr, mod_shift_ptr, mod_at, ok, mean, rstd, PROLOGUE).to(tl.float32)
        if SMOOTH:  # 2 ulp of fp32 do not matter before fp16
            v = v / tl.load(smooth_ptr + at, mask=ok, other=1.0).to(tl.float32)
        up, back = _powers(_largest(v), 134)

        # Rows b, columns of P1.
        y = _times(_turned((v * up).to(tl.float16), SLICES), left, SLICES, BATCHED, UPCAST)
        z = _times(_turned(y.to(tl.float16), SLICES), right, SLICES, BATCHED, UPCAST) * (down * back)
        scale = _scale_of(_largest(z), clip, TOP)
        tl.store(s_ptr + part * M + m, scale)

        q = tl.where(z >= 0.0, 1, -1) if SIGN else _rounded(z * (1.0 / scale), TOP, UNSIGNED)
        q_row = m.to(tl.int64) * ldq
        if LAYOUT > 1 and P2 % LAYOUT > 0:  # the planes of a row's channels change from row to row
            tl.store(q_ptr + q_row + (at % LAYOUT) * plane + at // LAYOUT, q.to(tl.int8), mask=ok)
        else:
            q_first = q_row + first // (2 if LAYOUT == 0 else LAYOUT)
            _store_codes(q_ptr, q, q_first, row_ok, 0, P2, plane, LAYOUT)
