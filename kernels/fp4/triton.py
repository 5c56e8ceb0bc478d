"""Block-scaled fp4 on Triton: the activation quantizer, and y = (x . w^T) * scales + low @ up^T + bias in one
launch.

The quantizer encodes e2m1, e4m3 and e8m0 in integer arithmetic, so its codes and scales are those of `naive`,
bit for bit. A NaN or an infinity makes the scale of its block NaN, which both formats can say, and the fp32
scale of its token too: that NaN survives the product whatever the tensor cores make of the block's.

The product takes the scales as plain (rows, K / block) tiles, which go through registers. TMA loads of scales
that lie in blocks of 128 x 4, as cuBLAS and Triton's 5-D descriptors have them, would save the way through
registers on sm_100.
"""

import triton
import triton.language as tl

from ..quant_activation.triton import _ROUND, _ROUND_BITS, _TINY, _dot
from ..quant_linear.triton import _load, _low_rank, _tile

# The second level of the activations' scales: none (mxfp4), one given for the tensor, one measured for each
# token.
NONE, GIVEN, TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _nearest(v):
    """The integer nearest to v, 0 <= v < 2^22, ties to even."""
    return (v + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS


@triton.jit
def _encode_e2m1(v):
    """fp32 -> codes 0..15 as int32, saturating at 6. Steps of 1/2 below 2, of 1 below 4, of 2 below 6."""
    a = tl.abs(v)
    a = tl.where(a < 6.0, a, 6.0)  # of NaN too
    code = tl.where(a < 2.0, _nearest(2.0 * a), tl.where(a < 4.0, _nearest(a) + 2, _nearest(0.5 * a) + 4))
    return code | ((v.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _decode_e2m1(code):
    """Codes 0..15 -> fp32."""
    c = code & 7
    value = tl.where(c < 4, c * 0.5, tl.where(c < 6, c - 2.0, c * 2.0 - 8.0))
    return tl.where(code < 8, value, -value)


@triton.jit
def _encode_e4m3(v):
    """fp32 v >= 0 -> codes 0..127 as int32, saturating at 448; 127 is NaN."""
    c = tl.where(v < 448.0, v, 448.0)
    bits = c.to(tl.int32, bitcast=True)
    # The exponent's bias, 127 - 7, eight codes each.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    code = tl.where(c < 0.015625, _nearest(c * 512.0), normal)
    return tl.where(v == v, code, 127)


@triton.jit
def _decode_scale(code, BLOCK: tl.constexpr):
    """The fp32 value of e4m3 codes 0..127 (BLOCK 16) or of e8m0 exponents 0..255 (BLOCK 32), int32."""
    if BLOCK == 16:
        value = tl.where(code < 8, code * 0.001953125, ((code + 960) << 20).to(tl.float32, bitcast=True))
        value = tl.where(code == 127, float("nan"), value)
    else:
        bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def _quantize_blocks(v, bits, token_scale, BLOCK: tl.constexpr):
    """v (BM, blocks, BLOCK) fp32, bits (BM, blocks) the largest |v| of each as int32 -> codes of v and of the
    scales, int32."""
    if BLOCK == 16:
        six = tl.full(bits.shape, 6.0, tl.float32)
        above = tl.broadcast_to(token_scale[:, None], bits.shape)
        scale = _encode_e4m3(tl.div_rn(tl.div_rn(bits.to(tl.float32, bitcast=True), six), above))
        scale = tl.where(bits < _INF_BITS, scale, 127)
        divisor = _decode_scale(scale, BLOCK) * above
        zero = divisor == 0.0
        code = _encode_e2m1(tl.div_rn(v, tl.broadcast_to(tl.where(zero, 1.0, divisor)[:, :, None], v.shape)))
        code = tl.where(zero[:, :, None], 0, code)
    else:
        # The exponent of the largest value less that of 4, the highest power of two in e2m1. Its reciprocal
        # is exact.
        finite = bits < _INF_BITS
        scale = tl.where(finite, tl.maximum((bits >> 23) - 2, 0), 255)
        factor = tl.where(finite, (254 - scale) << 23, 0).to(tl.float32, bitcast=True)
        code = _encode_e2m1(v * factor[:, :, None])
    return code, scale


@triton.jit
def quantize_fp4_kernel(
    x_ptr, smooth_ptr, down_ptr, given_ptr, q_ptr, s_ptr, t_ptr, low_ptr, M, K, R, ldx, ldq, lds, ld_down,
    ld_low,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program quantizes BM tokens, BK channels at a time; TOKEN reads them twice.
    x (M, K) 16 bit; smooth (K,); down (K, R) 16 bit; given (1,) fp32. q (M, K / 2), s (M, K / BLOCK) uint8; t
    (M,) fp32, the token's scale or 1; low (M, R) = x @ down. RP: R to a power of two from 16, 0 for no
    branch.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = m < M
    rows = m.to(tl.int64)
    BLOCKS: tl.constexpr = BK // BLOCK
    token_scale = tl.full((BM,), 1.0, tl.float32)
    if LEVEL == GIVEN:
        token_scale *= tl.load(given_ptr).to(tl.float32)
    largest = tl.zeros((BM,), dtype=tl.int32)
    if RP > 0:
        r = tl.arange(0, RP)
        low = tl.zeros((BM, RP), dtype=tl.float32)
    PASSES: tl.constexpr = 2 if LEVEL == TOKEN else 1
    for step in tl.static_range(PASSES):
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            x_ok = row_ok[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + (rows * ldx)[:, None] + k[None, :], mask=x_ok, other=0.0)
            if RP > 0 and step == 0:
                d_ok = (k < K)[:, None] & (r < R)[None, :]
                d = tl.load(down_ptr + k[:, None] * ld_down + r[None, :], mask=d_ok, other=0.0)
                low = _dot(x, d.to(x.dtype), low, UPCAST)
            v = x.to(tl.float32)
            if SMOOTH:
                factor = tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32)
                v = tl.div_rn(v, tl.broadcast_to(factor[None, :], v.shape))
            v = tl.reshape(v, (BM, BLOCKS, BLOCK))
            # As integers, which order NaN above infinity above all others.
            bits = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
            if step == 0:
                largest = tl.maximum(largest, tl.max(bits, axis=1))
            if step == PASSES - 1:
                q, code = _quantize_blocks(v, bits, token_scale, BLOCK)
                even, odd = tl.split(tl.reshape(q, (BM, BK // 2, 2)))
                b = start // 2 + tl.arange(0, BK // 2)
                q_at = q_ptr + (rows * ldq)[:, None] + b[None, :]
                tl.store(q_at, (even | (odd << 4)).to(tl.uint8), mask=row_ok[:, None] & (2 * b < K)[None, :])
                g = start // BLOCK + tl.arange(0, BLOCKS)
                s_at = s_ptr + (rows * lds)[:, None] + g[None, :]
                tl.store(s_at, code.to(tl.uint8), mask=row_ok[:, None] & (BLOCK * g < K)[None, :])
        if LEVEL == TOKEN and step == 0:
            tiny: tl.constexpr = _TINY
            floor = tl.full((BM,), tiny, tl.float32).to(tl.int32, bitcast=True)
            top = tl.full((BM,), 2688.0, tl.float32)  # 6 times 448, the largest value times the largest scale
            token_scale = tl.div_rn(tl.maximum(largest, floor).to(tl.float32, bitcast=True), top)
    tl.store(t_ptr + m, tl.where(largest < _INF_BITS, token_scale, float("nan")), mask=row_ok)
    if RP > 0:
        out = low_ptr + (rows * ld_low)[:, None] + r[None, :]
        tl.store(out, low.to(low_ptr.dtype.element_ty), mask=row_ok[:, None] & (r < R)[None, :])


@triton.jit
def _dequantized(q, s, BLOCK: tl.constexpr):
    """Bytes (rows, BK) and scales (rows, 2 BK / BLOCK) -> the even channels and the odd ones, (rows, BK)
    fp32."""
    ROWS: tl.constexpr = q.shape[0]
    BK: tl.constexpr = q.shape[1]
    shape: tl.constexpr = (ROWS, 2 * BK // BLOCK, BLOCK // 2)
    q = tl.reshape(q.to(tl.int32), shape)
    scale = _decode_scale(s.to(tl.int32), BLOCK)[:, :, None]
    return tl.reshape(_decode_e2m1(q & 15) * scale, (ROWS, BK)), tl.reshape(
        _decode_e2m1(q >> 4) * scale, (ROWS, BK)
    )


@triton.jit
def _product(x, sx, w, sw, acc, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x . w^T. Bytes x (BM, BK), w (BN, BK), scales sx and sw as uint8. UPCAST: decoded here, in
    fp32."""
    if UPCAST:
        x_even, x_odd = _dequantized(x, sx, BLOCK)
        w_even, w_odd = _dequantized(w, sw, BLOCK)
        acc = tl.dot(x_even, tl.trans(w_even), acc, input_precision="ieee")
        acc = tl.dot(x_odd, tl.trans(w_odd), acc, input_precision="ieee")
    elif BLOCK == 16:
        sx, sw = sx.to(tl.float8e4nv, bitcast=True), sw.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(x, sx, "e2m1", tl.trans(w), sw, "e2m1", acc)
    else:
        acc = tl.dot_scaled(x, sx, "e2m1", tl.trans(w), sw, "e2m1", acc)
    return acc


@triton.jit
def gemm_fp4_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, tx_ptr, tw_ptr, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ld_sx, ld_sw, ldy, step_tw, ld_low, ld_up,
    BLOCK: tl.constexpr, EVEN_K: tl.constexpr, HAS_TW: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x (M, KB) and w (N, KB) bytes of two codes, sx (M, 2 KB / BLOCK) and sw (N, 2 KB / BLOCK) uint8, tx
    (M,) fp32, tw (1,) with step_tw 0 or (N,) with 1, fp32. low (M, R), up (N, R), bias (N,), y (M, N). BK:
    bytes a step. BR 0: no low rank."""
    tm, tn = _tile(M, N, BM, BN, GROUP_M)
    # Rows past the end repeat the last one, so that only k needs masks; they are not stored.
    m = tl.minimum(tm * BM + tl.arange(0, BM), M - 1)
    n = tl.minimum(tn * BN + tl.arange(0, BN), N - 1)
    BLOCKS: tl.constexpr = 2 * BK // BLOCK
    k = tl.arange(0, BK)
    g = tl.arange(0, BLOCKS)
    m_long = m.to(tl.int64)
    n_long = n.to(tl.int64)
    xp = x_ptr + (m_long * ldx)[:, None] + k[None, :]
    wp = w_ptr + (n_long * ldw)[:, None] + k[None, :]
    sxp = sx_ptr + (m_long * ld_sx)[:, None] + g[None, :]
    swp = sw_ptr + (n_long * ld_sw)[:, None] + g[None, :]
    out = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, KB, BK):
        k_ok = (k0 + k < KB)[None, :]
        g_ok = (k0 + g * (BLOCK // 2) < KB)[None, :]
        x = _load(xp, k_ok, EVEN_K)
        w = _load(wp, k_ok, EVEN_K)
        out = _product(x, _load(sxp, g_ok, EVEN_K), w, _load(swp, g_ok, EVEN_K), out, BLOCK, UPCAST)
        xp += BK
        wp += BK
        sxp += BLOCKS
        swp += BLOCKS
    scale = tl.load(tx_ptr + m)[:, None]
    if HAS_TW:
        scale = scale * tl.load(tw_ptr + n * step_tw).to(tl.float32)[None, :]
    out *= scale
    if BR > 0:
        out = _low_rank(out, low_ptr, up_ptr, m_long * ld_low, n * ld_up, R, BR, False, UPCAST)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    m_y = (tm * BM + tl.arange(0, BM)).to(tl.int64)
    n_y = tn * BN + tl.arange(0, BN)
    yp = y_ptr + m_y[:, None] * ldy + n_y[None, :]
    tl.store(yp, out.to(y_ptr.dtype.element_ty), mask=(m_y < M)[:, None] & (n_y < N)[None, :])
