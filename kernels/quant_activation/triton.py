"""The activation quantizer on Triton: one program quantizes a block of tokens, 64 channels at a time.

A tile of (tokens, 64 channels) is the unit: it is one group of the group scales, and every Hadamard block of
2 to 256 channels is H(64 or less) within tiles times a factor of 1, 2 or 4 across neighbouring tiles, so H256
needs no (256, 256) matrix in shared memory. The Hadamard matrix is made of +1 and -1 from the channel numbers
and multiplied by one `tl.dot`.

Scales and codes are those of `naive.quantize_activation`, bit for bit where nothing is rotated: division is
IEEE division (`_quotient` says where it is not, to the last bit), rounding is to even by adding 1.5 * 2^23.
The maximum is taken over the bits of |x| as integers, which lets NaN through.
"""

import triton
import triton.language as tl

from ..operator.quantizers import TINY

PLAIN, GELU, LAYERNORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the integer nearest to v in the low bits
_ROUND_BITS = tl.constexpr(0x4B400000)
_TINY = tl.constexpr(TINY)


@triton.jit
def _signs(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """blockdiag of the +-1 Hadamard matrix of SIZE <= 64 as (64, 64): `quant_core.transforms.hadamard` times
    sqrt(SIZE)."""
    z = tl.arange(0, 64)[:, None] ^ tl.arange(0, 64)[None, :]
    both = tl.arange(0, 64)[:, None] & tl.arange(0, 64)[None, :]
    # H4[a, b] = -1 where a ^ b = 3, one base-4 digit a Kronecker factor, the least significant first.
    threes = z & (z >> 1) & 0x15
    odd = (threes ^ (threes >> 2) ^ (threes >> 4)) & 1
    if SIZE == 32:  # H2 x H16: the fifth bit is Sylvester's
        odd = ((threes ^ (threes >> 2)) & 1) ^ ((both >> 4) & 1)
    elif SIZE == 16:
        odd = (threes ^ (threes >> 2)) & 1
    elif SIZE == 8:
        odd = (threes & 1) ^ ((both >> 2) & 1)
    elif SIZE == 4:
        odd = threes & 1
    elif SIZE == 2:
        odd = both & 1
    return tl.where(z < SIZE, 1 - 2 * odd, 0).to(tl.float32).to(DTYPE)


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    # The interpreter multiplies the bit patterns of bf16.
    if UPCAST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _statistics(x_ptr, rows, row_ok, K, eps):
    """Mean and 1 / sqrt(variance + eps) of each token, (BM,) fp32. Sums are taken about the first channel
    against cancellation."""
    k = tl.arange(0, 64)
    first = tl.load(x_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)
    total = tl.zeros_like(first)
    square = tl.zeros_like(first)
    for start in range(0, K, 64):
        ok = row_ok[:, None] & (start + k < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] + (start + k)[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.where(ok, x - first[:, None], 0.0)
        total += tl.sum(x, axis=1)
        square += tl.sum(x * x, axis=1)
    mean = total / K
    variance = tl.maximum(square / K - mean * mean, 0.0)
    return first + mean, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def _load(
    x_ptr, mod_scale_ptr, mod_shift_ptr, rows, mods, row_ok, mean, rstd, start, K, PROLOGUE: tl.constexpr
):
    """Tile (BM, 64) of the layer's input at channel `start`, after the fused step."""
    k = start + tl.arange(0, 64)
    ok = row_ok[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] + k[None, :], mask=ok, other=0.0)
    return _prologue(
        x,
        mod_scale_ptr,
        mod_shift_ptr,
        mods[:, None] + k[None, :],
        ok,
        mean[:, None],
        rstd[:, None],
        PROLOGUE,
    )


@triton.jit
def _prologue(x, mod_scale_ptr, mod_shift_ptr, mods, ok, mean, rstd, PROLOGUE: tl.constexpr):
    """The fused step on a tile of x whose modulation lies at offsets `mods`, rounded to the dtype of x as
    torch would. 0 where not ok."""
    if PROLOGUE == GELU:
        v = x.to(tl.float32)
        # tanh(u) = 1 - 2 / (exp(2 u) + 1); GELU with the tanh approximation
        u = 1.5957691216057308 * (v + 0.044715 * v * v * v)
        x = (v * (1.0 - 1.0 / (tl.exp(u) + 1.0))).to(x.dtype)
    elif PROLOGUE == LAYERNORM:
        normed = ((x.to(tl.float32) - mean) * rstd).to(x.dtype).to(tl.float32)
        scale = tl.load(mod_scale_ptr + mods, mask=ok, other=0.0).to(tl.float32)
        shift = tl.load(mod_shift_ptr + mods, mask=ok, other=0.0).to(tl.float32)
        x = tl.where(ok, normed * (1.0 + scale).to(x.dtype).to(tl.float32) + shift, 0.0).to(x.dtype)
    return x


@triton.jit
def _quotient(v, by, ASM: tl.constexpr):
    """v / by to the nearest, v (BM, 64) and by (BM, 1) or (1, 64), or of any other shapes that broadcast.

    ASM: in three operations a value in place of IEEE division's 16. The inverse of `by` is within a unit,
    the product off by 2.5 units at most, and the FMA knows by how much to 24 bits, so that what is rounded
    last is off by 2^-44 of itself. Quotients by divisors of 16 bits stay 2^-36 away from where rounding
    turns. By scales of 24 bits it may be wrong by a unit where the quotient is within 2^-44 of such a place:
    once in 2^20, and a code only changes where that is halfway between two. Infinite values, whose tokens
    are lost, give no quotient.
    """
    if ASM:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [by], dtype=tl.float32, is_pure=True, pack=1
        )
        # Of an infinite scale the inverse is 0, and the remainder of a finite value must not be NaN.
        by = tl.broadcast_to(tl.where(inverse == 0.0, 0.0, by), v.shape)
        inverse = tl.broadcast_to(inverse, v.shape)
        near = v * inverse
        out = tl.fma(tl.fma(-near, by, v), inverse, near)
    else:
        out = tl.div_rn(v, tl.broadcast_to(by, v.shape))
    return out


@triton.jit
def _transform(
    x,
    smooth_ptr,
    down_ptr,
    ld_down,
    carried,
    start,
    K,
    principal,
    shift,
    SMOOTH: tl.constexpr,
    ROTATION: tl.constexpr,
    ROT_DTYPE: tl.constexpr,
    PP: tl.constexpr,
    ASM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Shift, smoothing, principal components out and the Hadamard factor within the tile, (BM, 64) fp32,
    without its 1 / sqrt(size)."""
    k = start + tl.arange(0, 64)
    v = x.to(tl.float32) + shift
    v = tl.where((k < K)[None, :], v, 0.0)
    if PP > 0:
        p = tl.arange(0, PP)
        ok = (k < K)[:, None] & (p < principal)[None, :]
        back = tl.load(down_ptr + k[:, None] * ld_down + p[None, :], mask=ok, other=0.0)
    if SMOOTH:
        by = tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32)
        v = _quotient(v, by[None, :], ASM)
        if PP > 0:
            back = (back.to(tl.float32) * by[:, None]).to(back.dtype)
    if PP > 0:
        v -= _dot(carried, tl.trans(back), tl.zeros(v.shape, dtype=tl.float32), UPCAST)
    if ROTATION > 0:
        SIZE: tl.constexpr = ROTATION if ROTATION < 64 else 64
        zero = tl.zeros(v.shape, dtype=tl.float32)
        v = _dot(v.to(ROT_DTYPE), _signs(SIZE, ROT_DTYPE), zero, UPCAST)
    return v


@triton.jit
def _mix(tiles, ROTATION: tl.constexpr):
    """The Hadamard factor across tiles: H2 (128), H4 (256); then the 1 / sqrt(size) of the whole."""
    if ROTATION == 256:
        a, b, c, d = tiles
        tiles = (a + b + c - d, a + b - c + d, a - b + c + d, b + c + d - a)
    elif ROTATION == 128:
        a, b = tiles
        tiles = (a + b, a - b)
    return tiles


@triton.jit
def _absmax_bits(v):
    return tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _scale_of(bits, clip, TOP: tl.constexpr):
    """The scale of values whose largest magnitude has these bits as an integer."""
    tiny: tl.constexpr = _TINY
    floor = tl.full(bits.shape, tiny, tl.float32).to(tl.int32, bitcast=True)
    return tl.div_rn(
        tl.maximum(bits, floor).to(tl.float32, bitcast=True) * clip, tl.full(bits.shape, TOP, tl.float32)
    )


@triton.jit
def _rounded(v, TOP: tl.constexpr, UNSIGNED: tl.constexpr):
    """int32 codes of v in units of the scale, to the nearest, half to even."""
    v = tl.minimum(tl.maximum(v, 0.0 if UNSIGNED else -1.0 * TOP), 1.0 * TOP)
    return (v + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS


@triton.jit
def _codes(v, scale, TOP: tl.constexpr, SIGN: tl.constexpr, UNSIGNED: tl.constexpr, ASM: tl.constexpr):
    """int32 codes of v (BM, 64) at scale (BM,). SIGN: 1-bit codes, which no scale changes."""
    if SIGN:
        q = tl.where(v >= 0.0, 1, -1)
    else:
        q = _rounded(_quotient(v, scale[:, None], ASM), TOP, UNSIGNED)
    return q


@triton.jit
def _store_codes(q_ptr, q, q_rows, row_ok, start, K, plane, LAYOUT: tl.constexpr):
    """Stores codes (BM, N) of the channels start.. below K. LAYOUT 0: two codes a byte, the even channel low.
    1, 2, 4: int8, that many planes."""
    BM: tl.constexpr = q.shape[0]
    N: tl.constexpr = q.shape[1]
    if LAYOUT == 1:
        k = start + tl.arange(0, N)
        tl.store(q_ptr + q_rows[:, None] + k[None, :], q.to(tl.int8), mask=row_ok[:, None] & (k < K)[None, :])
    else:
        even, odd = tl.split(tl.reshape(q, (BM, N // 2, 2)))
        k = start // 2 + tl.arange(0, N // 2)
        ok = row_ok[:, None] & (2 * k < K)[None, :]
        if LAYOUT == 0:
            tl.store(q_ptr + q_rows[:, None] + k[None, :], ((even & 15) | (odd << 4)).to(tl.int8), mask=ok)
        elif LAYOUT == 2:
            tl.store(q_ptr + q_rows[:, None] + k[None, :], even.to(tl.int8), mask=ok)
            tl.store(q_ptr + q_rows[:, None] + (plane + k)[None, :], odd.to(tl.int8), mask=ok)
        else:
            q0, q2 = tl.split(tl.reshape(even, (BM, N // 4, 2)))
            q1, q3 = tl.split(tl.reshape(odd, (BM, N // 4, 2)))
            k = start // 4 + tl.arange(0, N // 4)
            ok = row_ok[:, None] & (4 * k < K)[None, :]
            base = q_ptr + q_rows[:, None] + k[None, :]
            tl.store(base, q0.to(tl.int8), mask=ok)
            tl.store(base + plane, q1.to(tl.int8), mask=ok)
            tl.store(base + 2 * plane, q2.to(tl.int8), mask=ok)
            tl.store(base + 3 * plane, q3.to(tl.int8), mask=ok)


@triton.jit
def quantize_kernel(
    x_ptr, smooth_ptr, down_ptr, mod_scale_ptr, mod_shift_ptr, q_ptr, s_ptr, low_ptr,
    M, K, width, R, principal, tokens, ldx, ldq, plane, ld_down, ld_low, ld_mod, shift, clip, eps,
    PROLOGUE: tl.constexpr, SMOOTH: tl.constexpr, ROTATION: tl.constexpr, ROT_DTYPE: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP: tl.constexpr, SIGN: tl.constexpr, UNSIGNED: tl.constexpr, LAYOUT: tl.constexpr, RP: tl.constexpr,
    PP: tl.constexpr, BM: tl.constexpr,
    TILES: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of BM tokens. Axis 1: slices of K channels each, with the same settings.

    x (M, width = slices K) 16 bit; smooth (slices K,); down (slices K, R) 16 bit; modulation (batches, slices
    K), `tokens` rows of x a batch. q (M, ...) codes; s (slices or slices K / 64, M) fp32; low (M, slices R) =
    x @ down, slice by slice. RP: R to a power of two, at least 16; 0 for no branch here. PP: likewise of
    `principal`, columns of the branch that take their share out of x; then low is read, not written.
    TILES: tiles at a time, ROTATION / 64 where that is more.
    """
    pid = tl.program_id(0)
    part = tl.program_id(1)
    m = pid * BM + tl.arange(0, BM)
    row_ok = m < M
    first = part * K
    rows = m.to(tl.int64) * ldx
    smooth_ptr += first
    down_ptr += first * ld_down
    q_rows = m.to(tl.int64) * ldq
    q_ptr += first // (2 if LAYOUT == 0 else LAYOUT)
    mods = (m // tokens) * ld_mod + first
    mean = tl.zeros((BM,), dtype=tl.float32)
    rstd = mean
    if PROLOGUE == LAYERNORM:
        mean, rstd = _statistics(x_ptr, rows, row_ok, width, eps)
    x_ptr += first
    norm: tl.constexpr = 1.0 / (ROTATION if ROTATION > 0 else 1) ** 0.5

    if RP > 0:
        r = tl.arange(0, RP)
        low = tl.zeros((BM, RP), dtype=tl.float32)
    carried = mean
    if PP > 0:
        p = tl.arange(0, PP)
        at = low_ptr + m[:, None].to(tl.int64) * ld_low + (part * R + p)[None, :]
        carried = tl.load(at, mask=row_ok[:, None] & (p < principal)[None, :], other=0.0)
    bits = tl.zeros((BM,), dtype=tl.int32)
    PASSES: tl.constexpr = 1 if GROUPED else 2
    scale = mean
    for step in tl.static_range(PASSES):
        for start in range(0, K, 64 * TILES):
            tiles = ()
            for t in tl.static_range(TILES):
                k0 = start + 64 * t
                x = _load(
                    x_ptr, mod_scale_ptr, mod_shift_ptr, rows, mods, row_ok, mean, rstd, k0, K, PROLOGUE
                )
                if RP > 0 and step == 0:
                    k = k0 + tl.arange(0, 64)
                    ok = (k < K)[:, None] & (r < R)[None, :]
                    d = tl.load(down_ptr + k[:, None] * ld_down + r[None, :], mask=ok, other=0.0)
                    low = _dot(x, d.to(x.dtype), low, UPCAST)
                tiles = tiles + (
                    _transform(
                        x,
                        smooth_ptr,
                        down_ptr,
                        ld_down,
                        carried,
                        k0,
                        K,
                        principal,
                        shift,
                        SMOOTH,
                        ROTATION,
                        ROT_DTYPE,
                        PP,
                        ASM,
                        UPCAST,
                    ),
                )
            tiles = _mix(tiles, ROTATION)
            for t in tl.static_range(TILES):
                k0 = start + 64 * t
                v = tiles[t] * norm
                if GROUPED:
                    scale = _scale_of(_absmax_bits(v), clip, TOP)
                    g = part * (K // 64) + k0 // 64
                    tl.store(s_ptr + g.to(tl.int64) * M + m, scale, mask=row_ok & (tl.zeros_like(m) + k0 < K))
                    _store_codes(
                        q_ptr,
                        _codes(v, scale, TOP, SIGN, UNSIGNED, ASM),
                        q_rows,
                        row_ok,
                        k0,
                        K,
                        plane,
                        LAYOUT,
                    )
                elif step == 0:
                    bits = tl.maximum(bits, _absmax_bits(v))
                else:
                    _store_codes(
                        q_ptr,
                        _codes(v, scale, TOP, SIGN, UNSIGNED, ASM),
                        q_rows,
                        row_ok,
                        k0,
                        K,
                        plane,
                        LAYOUT,
                    )
        if not GROUPED and step == 0:
            scale = _scale_of(bits, clip, TOP)
            tl.store(s_ptr + part * M + m, scale, mask=row_ok)
    if RP > 0:
        out = low_ptr + m[:, None].to(tl.int64) * ld_low + (part * R + r)[None, :]
        tl.store(out, low.to(low_ptr.dtype.element_ty), mask=row_ok[:, None] & (r < R)[None, :])
