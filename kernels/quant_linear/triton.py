"""The quantized matrix product on Triton: y = scales * (integer product) + low @ up^T + bias, one launch.

Codes of x come from `quant_activation`; weights stay packed. Three ways to the tensor cores, one source:

* int8: each byte of the weights holds PLANES codes. Shifted to the top of the byte, a code is 16 (4 bit) or
  64 (2 bit) times its value, which costs two instructions for eight codes and is divided out of the scale. x
  comes as int8, all first codes of the bytes, then all second ones ("planes"), so plane p of a weight tile
  meets a contiguous tile of x. |sum| < 2^31 to K = 100 000.
* int8 with SWAP, for wgmma on Hopper: y^T = W x^T, because only the left operand of a wgmma may come from
  registers, where the weights are unpacked; x goes from memory to shared memory as it is.
* native INT4 (`native_int4`): both sides packed, PLANES = 1, an entry point whose name asks for the rewrite.

Scales: one a row (CHANNEL), one a row and slice of the channels (SLICE), one a row and group of 64 (GROUP).
For GROUP the integer accumulator starts at the bits of 1.5 * 2^23, so that read as a float it is 1.5 * 2^23 +
sum and the conversion costs one FMA;
|sum| < 2^22 holds for 64 products of 8-bit codes, and the step is exact while the weight scale has 16 bits.
"""

import triton
import triton.language as tl

from .. import native_int4  # noqa: F401  (its hook must be there before the first compilation)

CHANNEL, SLICE, GROUP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _tile(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile coordinates of this program: GROUP_M rows of tiles are walked together, so that their weights are
    read from the L2."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = pid // (GROUP_M * columns)
    height = tl.minimum(rows - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * columns)
    return band * GROUP_M + within % height, within // height


@triton.jit
def unpack2(w, ASM: tl.constexpr):
    """Bytes of two signed 4-bit codes -> (16 low, 16 high) as int8."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=r,=r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = w << 4, w & -16
    return low, high


@triton.jit
def unpack4(w, ASM: tl.constexpr):
    """Bytes of four signed 2-bit codes -> (64 c0, 64 c1, 64 c2, 64 c3) as int8."""
    if ASM:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $4, 6; and.b32 $0, t, 0xC0C0C0C0; shl.b32 t, $4, 4; and.b32 $1, t, "
            "0xC0C0C0C0;"
            " shl.b32 t, $4, 2; and.b32 $2, t, 0xC0C0C0C0; and.b32 $3, $4, 0xC0C0C0C0; }",
            "=r,=r,=r,=r,r", [w], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        c0, c1, c2, c3 = w << 6, (w << 4) & -64, (w << 2) & -64, w & -64
    return c0, c1, c2, c3


@triton.jit
def _load(pointers, ok, EVEN: tl.constexpr):
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=ok, other=0)
    return tile


@triton.jit
def _product(a, b, acc, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(b, a, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _products(
    acc,
    xp,
    wp,
    x_ok,
    w_ok,
    plane,
    PLANES: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """acc plus the product of one block of bytes, over its planes."""
    w = _load(wp, w_ok, EVEN_K)
    if PLANES == 1:
        acc = _product(_load(xp, x_ok, EVEN_K), w, acc, SWAP)
    elif PLANES == 2:
        w0, w1 = unpack2(w, ASM)
        acc = _product(_load(xp, x_ok, EVEN_K), w0, acc, SWAP)
        acc = _product(_load(xp + plane, x_ok, EVEN_K), w1, acc, SWAP)
    else:
        w0, w1, w2, w3 = unpack4(w, ASM)
        acc = _product(_load(xp, x_ok, EVEN_K), w0, acc, SWAP)
        acc = _product(_load(xp + plane, x_ok, EVEN_K), w1, acc, SWAP)
        acc = _product(_load(xp + 2 * plane, x_ok, EVEN_K), w2, acc, SWAP)
        acc = _product(_load(xp + 3 * plane, x_ok, EVEN_K), w3, acc, SWAP)
    return acc


@triton.jit
def _scaled(out, acc, sx, sw, SWAP: tl.constexpr):
    """out + acc * sx * sw, sx (BM,) and sw (BN,)."""
    left, right = (sw, sx) if SWAP else (sx, sw)
    return tl.fma(acc, left[:, None] * right[None, :], out)


@triton.jit
def _low_rank(
    out,
    low_ptr,
    up_ptr,
    m_low,
    n_up,
    R,
    BR: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_R: tl.constexpr = False,
):
    """out + low @ up^T, BR of the R columns at a time. m_low, n_up: first element of each row of the two.
    EVEN_R: BR divides R."""
    for start in tl.range(0, R, BR, num_stages=1):
        r = start + tl.arange(0, BR)
        if SWAP:
            a = _load(up_ptr + n_up[:, None] + r[None, :], (r < R)[None, :], EVEN_R)
            b = _load(low_ptr + m_low[None, :] + r[:, None], (r < R)[:, None], EVEN_R)
            a = a.to(b.dtype)
        else:
            a = _load(low_ptr + m_low[:, None] + r[None, :], (r < R)[None, :], EVEN_R)
            b = _load(up_ptr + n_up[None, :] + r[:, None], (r < R)[:, None], EVEN_R)
            b = b.to(a.dtype)
        if UPCAST:
            out = tl.dot(a.to(tl.float32), b.to(tl.float32), out, input_precision="ieee")
        else:
            out = tl.dot(a, b, out)
    return out


@triton.jit
def _end(ends, segment):
    end = ends[0]
    for i in tl.static_range(1, 8):
        end = tl.where(segment == i, ends[i], end)
    return end


@triton.jit
def _gemm(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    PLANES: tl.constexpr, SCALES: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, MAGIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, EVEN_R: tl.constexpr,
    GROUP_M: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tm, tn = _tile(M, N, BM, BN, GROUP_M)
    # Rows past the end repeat the last one, so that only k needs masks; they are not stored.
    m = tl.minimum(tm * BM + tl.arange(0, BM), M - 1)
    n = tl.minimum(tn * BN + tl.arange(0, BN), N - 1)
    k = tl.arange(0, BK)
    m_x = m.to(tl.int64) * ldx
    n_w = n.to(tl.int64) * ldw
    GAIN: tl.constexpr = 1.0 if PLANES == 1 else (0.0625 if PLANES == 2 else 0.015625)
    START: tl.constexpr = _MAGIC_BITS if MAGIC else 0
    if SWAP:
        xp = x_ptr + m_x[None, :] + k[:, None]
        wp = w_ptr + n_w[:, None] + k[None, :]
        shape: tl.constexpr = (BN, BM)
    else:
        xp = x_ptr + m_x[:, None] + k[None, :]
        wp = w_ptr + n_w[None, :] + k[:, None]
        shape: tl.constexpr = (BM, BN)
    acc = tl.full(shape, START, dtype=tl.int32)
    out = tl.zeros(shape, dtype=tl.float32)
    scales = sx_ptr + m
    channels = sw_ptr + n

    end = KB
    segment = 0
    if SCALES == SLICE:
        end = ends[0]
    for k0 in range(0, KB, BK):
        k_ok = k0 + k < KB
        if SWAP:
            acc = _products(acc, xp, wp, k_ok[:, None], k_ok[None, :], plane, PLANES, SWAP, EVEN_K, ASM)
        else:
            acc = _products(acc, xp, wp, k_ok[None, :], k_ok[:, None], plane, PLANES, SWAP, EVEN_K, ASM)
        xp += BK
        wp += BK
        if SCALES == GROUP:
            sx = tl.load(scales)
            sw = tl.load(channels).to(tl.float32) * GAIN
            if MAGIC:
                f = acc.to(tl.float32, bitcast=True)
                c = sw[:, None] if SWAP else sw[None, :]
                t = tl.fma(f, tl.broadcast_to(c, f.shape), tl.broadcast_to(c * (-_MAGIC), f.shape))
                a = sx[None, :] if SWAP else sx[:, None]
                out = tl.fma(t, tl.broadcast_to(a, f.shape), out)
            else:
                out = _scaled(out, acc.to(tl.float32), sx, sw, SWAP)
            acc = tl.full(shape, START, dtype=tl.int32)
            scales += ld_sx
            channels += ld_sw
        elif SCALES == SLICE:
            if k0 + BK == end:
                sx = tl.load(scales + segment * ld_sx)
                sw = tl.load(channels + segment * ld_sw).to(tl.float32) * GAIN
                out = _scaled(out, acc.to(tl.float32), sx, sw, SWAP)
                acc = tl.full(shape, 0, dtype=tl.int32)
                segment += 1
                end = _end(ends, segment)
    if SCALES == CHANNEL:
        out = _scaled(out, acc.to(tl.float32), tl.load(scales), tl.load(channels).to(tl.float32) * GAIN, SWAP)
    if BR > 0:
        out = _low_rank(out, low_ptr, up_ptr, m.to(tl.int64) * ld_low, n * ld_up, R, BR, SWAP, UPCAST, EVEN_R)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n).to(tl.float32)
        out += bias[:, None] if SWAP else bias[None, :]
    m_y = (tm * BM + tl.arange(0, BM)).to(tl.int64)
    n_y = tn * BN + tl.arange(0, BN)
    if SWAP:
        yp = y_ptr + m_y[None, :] * ldy + n_y[:, None]
        ok = (m_y < M)[None, :] & (n_y < N)[:, None]
    else:
        yp = y_ptr + m_y[:, None] * ldy + n_y[None, :]
        ok = (m_y < M)[:, None] & (n_y < N)[None, :]
    if ACCUMULATE:
        out += tl.load(yp, mask=ok, other=0.0).to(tl.float32)
    tl.store(yp, out.to(y_ptr.dtype.element_ty), mask=ok)


# A rank of exactly 1 would be a constant, and its low rank compiled apart for no gain.
@triton.jit(do_not_specialize=["R"])
def gemm_int8(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    PLANES: tl.constexpr, SCALES: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, MAGIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, EVEN_R: tl.constexpr,
    GROUP_M: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x int8 (M, PLANES KB) in planes, w (N, KB) bytes, sx (segments, M) fp32, sw (segments, N), ends: eight
    integers, the ends of the slices in bytes. low (M, R), up (N, R), bias (N,), y (M, N). BK divides the ends
    of all slices; a group is one BK. ld_sx, ld_sw: from one segment's scales to the next's, 0 where all share
    one. BR 0: no low rank."""
    _gemm(
        x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldx, ldw, ldy,
        ld_sx, ld_sw, ld_low, ld_up, plane,
        PLANES, SCALES, SWAP, EVEN_K, MAGIC, HAS_BIAS, ACCUMULATE, BM, BN, BK, BR, EVEN_R, GROUP_M, ASM,
        UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def gemm_s4s4(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    PLANES: tl.constexpr, SCALES: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, MAGIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, EVEN_R: tl.constexpr,
    GROUP_M: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `gemm_int8` with PLANES = 1 and x (M, KB) packed, signed codes: its products become
    `mma.m16n8k64.s4.s4`."""
    _gemm(
        x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldx, ldw, ldy,
        ld_sx, ld_sw, ld_low, ld_up, plane,
        PLANES, SCALES, SWAP, EVEN_K, MAGIC, HAS_BIAS, ACCUMULATE, BM, BN, BK, BR, EVEN_R, GROUP_M, ASM,
        UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def gemm_u4s4(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    PLANES: tl.constexpr, SCALES: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, MAGIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, EVEN_R: tl.constexpr,
    GROUP_M: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `gemm_s4s4` with unsigned codes of x: its products become `mma.m16n8k64.u4.s4`."""
    _gemm(
        x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldx, ldw, ldy,
        ld_sx, ld_sw, ld_low, ld_up, plane,
        PLANES, SCALES, SWAP, EVEN_K, MAGIC, HAS_BIAS, ACCUMULATE, BM, BN, BK, BR, EVEN_R, GROUP_M, ASM,
        UPCAST,
    )  # fmt: skip
