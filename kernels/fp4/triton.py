"""Block-scaled fp4 on Triton: the activation quantizer, and y = (x . w^T) * scales + low @ up^T + bias in one
launch.

The quantizer encodes e4m3 and e8m0 in integer arithmetic, and e2m1 too in the interpreter, so that its
codes and scales are those of `naive`, bit for bit; on a card the codes of nvfp4 come from the instruction
that rounds likewise. A NaN or an infinity makes the scale of its block NaN, which both formats can say, and
the fp32 scale of its token too: that NaN survives the product whatever the tensor cores make of the block's.

The product takes the scales as plain (rows, K / block) tiles, which go through registers. TMA loads of scales
that lie in blocks of 128 x 4, as cuBLAS and Triton's 5-D descriptors have them, would save the way through
registers on sm_100.
"""

import triton
import triton.language as tl

from ..quant_activation.triton import (
    _ROUND,
    _ROUND_BITS,
    _TINY,
    LAYERNORM,
    _dot,
    _mix,
    _quotient,
    _statistics,
    _store_codes,
    _transform,
)
from ..quant_activation.triton import _load as _load_x
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
def _scale_code(bits, token_scale, LARGEST: tl.constexpr, ASM: tl.constexpr):
    """e4m3 codes, int32, of scales that bring values whose magnitude has these bits to LARGEST; 127, NaN,
    where one is not finite."""
    largest = tl.full(bits.shape, LARGEST, tl.float32)
    scale = _quotient(bits.to(tl.float32, bitcast=True), largest, ASM)
    scale = _encode_e4m3(_quotient(scale, token_scale, ASM))
    return tl.where(bits < _INF_BITS, scale, 127)


@triton.jit
def _coded(v, ASM: tl.constexpr):
    """(e2m1 codes, int8, the values that they stand for, fp32) of fp32. ASM: by Blackwell's own conversions,
    of two values at a time, in place of 18 instructions a value."""
    if ASM:
        code, value = tl.inline_asm_elementwise(
            "{ .reg .b8 t, u; .reg .b16 a, b; .reg .b32 h, i; "
            "cvt.rn.satfinite.e2m1x2.f32 t, $6, $5; cvt.rn.satfinite.e2m1x2.f32 u, $8, $7; "
            "cvt.rn.f16x2.e2m1x2 h, t; mov.b32 {a, b}, h; cvt.f32.f16 $1, a; cvt.f32.f16 $2, b; "
            "cvt.rn.f16x2.e2m1x2 h, u; mov.b32 {a, b}, h; cvt.f32.f16 $3, a; cvt.f32.f16 $4, b; "
            "cvt.u32.u8 h, t; cvt.u32.u8 i, u; shl.b32 i, i, 16; or.b32 h, h, i; "
            "and.b32 i, h, 0x00F000F0; shl.b32 i, i, 4; and.b32 h, h, 0x000F000F; or.b32 $0, h, i; }",
            "=r,=f,=f,=f,=f,f,f,f,f", [v], dtype=(tl.int8, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        code = _encode_e2m1(v)
        value = _decode_e2m1(code)
    return code, value


@triton.jit
def _at_scale(v, scale, token_scale, ASM: tl.constexpr):
    """(codes of v (BM, blocks, 16) at e4m3 codes of scales (BM, blocks), what they are off by)."""
    divisor = (_decode_scale(scale, 16) * token_scale)[:, :, None]
    zero = divisor == 0.0
    code, value = _coded(_quotient(v, tl.where(zero, 1.0, divisor), ASM), ASM)
    return tl.where(zero, tl.zeros_like(code), code), value * divisor - v


@triton.jit
def _quantize_blocks(v, bits, token_scale, BLOCK: tl.constexpr, EITHER: tl.constexpr, ASM: tl.constexpr):
    """v (BM, blocks, BLOCK) fp32, bits (BM, blocks) the largest |v| of each as int32, which orders NaN above
    infinity above all others -> codes of v and of the scales. EITHER: of the scales for 6 and for 4, that
    with the smaller squared error of the block."""
    if BLOCK == 16:
        above = tl.broadcast_to(token_scale[:, None], bits.shape)
        scale = _scale_code(bits, above, 6.0, ASM)
        code, rest = _at_scale(v, scale, above, ASM)
        if EITHER:
            four = _scale_code(bits, above, 4.0, ASM)
            other, rest_of_other = _at_scale(v, four, above, ASM)
            better = tl.sum(rest_of_other * rest_of_other, axis=2) < tl.sum(rest * rest, axis=2)
            scale = tl.where(better, four, scale)
            code = tl.where(better[:, :, None], other, code)
    else:
        # The exponent of the largest value less that of 4, the highest power of two in e2m1. Its reciprocal
        # is exact.
        finite = bits < _INF_BITS
        scale = tl.where(finite, tl.maximum((bits >> 23) - 2, 0), 255)
        factor = tl.where(finite, (254 - scale) << 23, 0).to(tl.float32, bitcast=True)
        code = _encode_e2m1(v * factor[:, :, None])
    return code, scale


@triton.jit
def _token_scale(largest, EITHER: tl.constexpr):
    """The fp32 scale of tokens whose largest magnitude has these bits. 2688 is 6 times 448, the largest value
    times the largest scale; 1536 is 6 times 256, of which e4m3 has one and a half: for either of two
    scales."""
    tiny: tl.constexpr = _TINY
    floor = tl.full(largest.shape, tiny, tl.float32).to(tl.int32, bitcast=True)
    top = tl.full(largest.shape, 1536.0 if EITHER else 2688.0, tl.float32)
    return tl.div_rn(tl.maximum(largest, floor).to(tl.float32, bitcast=True), top)


@triton.jit
def _tile_of(
    x_ptr, mod_scale_ptr, mod_shift_ptr, smooth_ptr, down_ptr, ld_down, carried, low, rows, mods, row_ok,
    mean, rstd, start, K, R, principal, PROLOGUE: tl.constexpr, SMOOTH: tl.constexpr, ROTATION: tl.constexpr,
    ROT_DTYPE: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(64 channels of Tx (BM, 64) from `start` on, low (BM, RP) with their share of x @ down); RP 0: low as
    it is."""
    x = _load_x(x_ptr, mod_scale_ptr, mod_shift_ptr, rows, mods, row_ok, mean, rstd, start, K, PROLOGUE)
    if RP > 0:
        k, r = start + tl.arange(0, 64), tl.arange(0, RP)
        ok = (k < K)[:, None] & (r < R)[None, :]
        d = tl.load(down_ptr + k[:, None] * ld_down + r[None, :], mask=ok, other=0.0)
        low = _dot(x, d.to(x.dtype), low, UPCAST)
    v = _transform(
        x, smooth_ptr, down_ptr, ld_down, carried, start, K, principal, 0.0, SMOOTH, ROTATION, ROT_DTYPE, PP,
        ASM, UPCAST,
    )  # fmt: skip
    return v, low


@triton.jit
def _columns(low_ptr, m, ld_low, row_ok, count, WIDTH: tl.constexpr):
    """(pointers (BM, WIDTH) to the first columns of the low rank's rows m, which of them there are)."""
    r = tl.arange(0, WIDTH)
    return low_ptr + m[:, None].to(tl.int64) * ld_low + r[None, :], row_ok[:, None] & (r < count)[None, :]


@triton.jit
def _store_scales(rows_ptr, code, row_ok, start, K, BLOCK: tl.constexpr):
    """Stores codes of scales (BM, blocks) of the channels from `start` on; rows_ptr (BM, 1)."""
    g = start // BLOCK + tl.arange(0, code.shape[1])
    tl.store(rows_ptr + g[None, :], code.to(tl.uint8), mask=row_ok[:, None] & (BLOCK * g < K)[None, :])


@triton.jit
def quantize_fp4_kernel(
    x_ptr, smooth_ptr, down_ptr, mod_scale_ptr, mod_shift_ptr, given_ptr, q_ptr, s_ptr, t_ptr, low_ptr,
    M, K, R, principal, tokens, ldx, ldq, lds, ld_down, ld_low, ld_mod, eps,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr, EITHER: tl.constexpr, PROLOGUE: tl.constexpr,
    SMOOTH: tl.constexpr, ROTATION: tl.constexpr, ROT_DTYPE: tl.constexpr, RP: tl.constexpr,
    PP: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program quantizes BM tokens, TILES tiles of 64 channels at a time; TOKEN reads them twice.

    given (1,) fp32. q (M, K / 2) int8, s (M, K / BLOCK) uint8; t (M,) fp32, the token's scale or 1. All else
    is as in `quantize_kernel`, whose steps before the codes these are.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = m < M
    rows = m.to(tl.int64) * ldx
    mods = (m // tokens) * ld_mod
    mean = tl.zeros((BM,), dtype=tl.float32)
    rstd = mean
    if PROLOGUE == LAYERNORM:
        mean, rstd = _statistics(x_ptr, rows, row_ok, K, eps)
    norm: tl.constexpr = 1.0 / (ROTATION if ROTATION > 0 else 1) ** 0.5
    token_scale = tl.full((BM,), 1.0, tl.float32)
    if LEVEL == GIVEN:
        token_scale *= tl.load(given_ptr).to(tl.float32)
    largest = tl.zeros((BM,), dtype=tl.int32)
    low, carried = mean, mean
    if RP > 0:
        low = tl.zeros((BM, RP), dtype=tl.float32)
    if PP > 0:
        at, ok = _columns(low_ptr, m, ld_low, row_ok, principal, PP)
        carried = tl.load(at, mask=ok, other=0.0)
    PASSES: tl.constexpr = 2 if LEVEL == TOKEN else 1
    for step in tl.static_range(PASSES):
        for start in range(0, K, 64 * TILES):
            tiles = ()
            for i in tl.static_range(TILES):
                v, low = _tile_of(
                    x_ptr, mod_scale_ptr, mod_shift_ptr, smooth_ptr, down_ptr, ld_down, carried, low, rows,
                    mods, row_ok, mean, rstd, start + 64 * i, K, R, principal, PROLOGUE, SMOOTH, ROTATION,
                    ROT_DTYPE, RP if step == 0 else 0, PP, ASM, UPCAST,
                )  # fmt: skip
                tiles = tiles + (v,)
            tiles = _mix(tiles, ROTATION)
            for i in tl.static_range(TILES):
                k0 = start + 64 * i
                v = tl.reshape(tiles[i] * norm, (BM, 64 // BLOCK, BLOCK))
                bits = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
                if step == 0:
                    largest = tl.maximum(largest, tl.max(bits, axis=1))
                if step == PASSES - 1:
                    q, code = _quantize_blocks(v, bits, token_scale, BLOCK, EITHER, ASM)
                    _store_codes(q_ptr, tl.reshape(q, (BM, 64)), m.to(tl.int64) * ldq, row_ok, k0, K, 0, 0)
                    _store_scales(s_ptr + m.to(tl.int64)[:, None] * lds, code, row_ok, k0, K, BLOCK)
        if LEVEL == TOKEN and step == 0:
            token_scale = _token_scale(largest, EITHER)
    tl.store(t_ptr + m, tl.where(largest < _INF_BITS, token_scale, float("nan")), mask=row_ok)
    if RP > 0:
        at, ok = _columns(low_ptr, m, ld_low, row_ok, R, RP)
        tl.store(at, low.to(low_ptr.dtype.element_ty), mask=ok)


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
    BLOCK: tl.constexpr, EVEN_K: tl.constexpr, HAS_TW: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x (M, KB) and w (N, KB) bytes of two codes, sx (M, 2 KB / BLOCK) and sw (N, 2 KB / BLOCK) uint8, tx
    (M,) fp32, tw (1,) with step_tw 0 or (N,) with 1, fp32. low (M, R), up (N, R), bias (N,), y (M, N). BK:
    bytes a step. BR 0: no low rank. ACCUMULATE: y is added to."""
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
    y_ok = (m_y < M)[:, None] & (n_y < N)[None, :]
    if ACCUMULATE:
        out += tl.load(yp, mask=y_ok, other=0.0).to(tl.float32)
    tl.store(yp, out.to(y_ptr.dtype.element_ty), mask=y_ok)
