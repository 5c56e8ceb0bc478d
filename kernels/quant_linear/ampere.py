"""The quantized matrix product for sm_80 to sm_89 on `mma.m16n8k64.s4`, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .. import native_int4  # noqa: F401  (its hook must be there before the first compilation)

CHANNEL, GROUP = gl.constexpr(0), gl.constexpr(2)
_MAGIC = gl.constexpr(12582912.0)
_MAGIC_BITS = gl.constexpr(0x4B400000)


@gluon.jit
def _tile(M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP_M: gl.constexpr):
    """As in `triton._tile`."""
    pid = gl.program_id(0)
    rows, columns = gl.cdiv(M, BM), gl.cdiv(N, BN)
    band = pid // (GROUP_M * columns)
    height = gl.minimum(rows - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * columns)
    return band * GROUP_M + within % height, within // height


@gluon.jit
def _fetch(xs, ws, sxs, sws, xp, wp, sxp, swp, k, KB, ld_sx, ld_sw,
           SLOT: gl.constexpr, G: gl.constexpr, SCALES: gl.constexpr):
    ok = k < KB
    more = k + 32 * G < KB
    for g in gl.static_range(G):
        async_copy.async_copy_global_to_shared(xs[SLOT * G + g], xp + 32 * g)
        if SCALES == GROUP:
            async_copy.async_copy_global_to_shared(ws[SLOT * G + g], wp + 32 * g)
        else:
            async_copy.async_copy_global_to_shared(ws[SLOT * G + g], wp + 32 * g, mask=ok)
    if SCALES == GROUP:
        async_copy.async_copy_global_to_shared(sxs[SLOT], sxp, mask=ok)
        async_copy.async_copy_global_to_shared(sws[SLOT], swp)
    async_copy.commit_group()
    step = gl.where(more, 32 * G, 0)
    xp += step
    wp += step
    if SCALES == GROUP:
        sxp += gl.where(more, ld_sx * G, 0)
        swp += gl.where(more, ld_sw * G, 0)
    return xp, wp, sxp, swp


@gluon.jit
def _wide(a, like):
    a, _ = gl.broadcast(a, like)
    return a


@gluon.jit
def _rescaled(outs, acc, sx, sw, J: gl.constexpr, COUNT: gl.constexpr, MAGIC: gl.constexpr):
    """outs with acc * sx * sw added to the one of chunk J."""
    if MAGIC:
        f = acc.to(gl.float32, bitcast=True)
        c = sw[None, :]
        t = gl.fma(f, _wide(c, f), _wide(c * (-_MAGIC), f))
    else:
        t = acc.to(gl.float32) * sw[None, :]
    one = gl.fma(t, _wide(sx[:, None], t), outs[J])
    new = ()
    for i in gl.static_range(COUNT):
        new = new + (one if i == J else outs[i],)
    return new


@gluon.jit
def _gemm(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    SCALES: gl.constexpr, MAGIC: gl.constexpr, HAS_BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, BR: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, NC: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WM, WN], instr_shape=[16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    COPY: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [WM * WN, 1], [1, 0])
    COPY_SX: gl.constexpr = gl.BlockedLayout([1], [32], [WM * WN], [0])
    COPY_SW: gl.constexpr = gl.BlockedLayout([2], [32], [WM * WN], [0])
    TILE: gl.constexpr = gl.SwizzledSharedLayout(16, 4, 2, [1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COUNT: gl.constexpr = BN // NC
    tm, tn = _tile(M, N, BM, BN, GROUP_M)

    xs, ws, sxs, sws = (), (), (), ()
    for _ in gl.static_range(STAGES * G):
        xs = xs + (gl.allocate_shared_memory(gl.int8, [BM, 32], TILE),)
        ws = ws + (gl.allocate_shared_memory(gl.int8, [BN, 32], TILE),)
    if SCALES == GROUP:
        for _ in gl.static_range(STAGES):
            sxs = sxs + (gl.allocate_shared_memory(gl.float32, [G * BM], LINE),)
            sws = sws + (gl.allocate_shared_memory(sw_ptr.dtype.element_ty, [G * BN], LINE),)
    k = gl.arange(0, 32, layout=gl.SliceLayout(0, COPY))
    m = gl.minimum(tm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY)), M - 1)
    n = gl.minimum(tn * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, COPY)), N - 1)
    xp = x_ptr + (m.to(gl.int64) * ldx)[:, None] + k[None, :]
    wp = w_ptr + (n.to(gl.int64) * ldw)[:, None] + k[None, :]
    i = gl.arange(0, G * BM, layout=COPY_SX)
    sxp = sx_ptr + i // BM * ld_sx + gl.minimum(tm * BM + i % BM, M - 1)
    i = gl.arange(0, G * BN, layout=COPY_SW)
    n_line = gl.max_contiguous(gl.multiple_of(gl.minimum(tn * BN + i % BN, N - 2), 2), 2)
    swp = sw_ptr + i // BN * ld_sw + n_line

    START: gl.constexpr = _MAGIC_BITS if MAGIC else 0
    start = gl.full([BM, NC], START, gl.int32, MMA)
    zero = gl.zeros([BM, NC], gl.float32, MMA)
    outs, accs = (), ()
    for j in gl.static_range(COUNT):
        if SCALES == GROUP:
            outs = outs + (zero,)
        else:
            accs = accs + (start,)
    STEP: gl.constexpr = 32 * G
    for s in gl.static_range(STAGES - 1):
        xp, wp, sxp, swp = _fetch(xs, ws, sxs, sws, xp, wp, sxp, swp, s * STEP, KB, ld_sx, ld_sw, s, G, SCALES)
    for k0 in range(0, KB, STEP * STAGES):
        for s in gl.static_range(STAGES):
            async_copy.wait_group(STAGES - 2)
            xp, wp, sxp, swp = _fetch(
                xs, ws, sxs, sws, xp, wp, sxp, swp, k0 + (s + STAGES - 1) * STEP, KB, ld_sx, ld_sw,
                (s + STAGES - 1) % STAGES, G, SCALES,
            )
            for g in gl.static_range(G):
                a = xs[s * G + g].load(A)
                if SCALES == GROUP:
                    sx = sxs[s].slice(g * BM, BM).load(ROW)
                    last = start
                    last_sw = sws[s].slice(g * BN, NC).load(COLUMN).to(gl.float32)
                    for j in gl.static_range(COUNT):
                        b = ws[s * G + g].slice(j * NC, NC, 0).permute([1, 0]).load(B)
                        acc = mma_v2(a, b, start)
                        sw = sws[s].slice(g * BN + j * NC, NC).load(COLUMN).to(gl.float32)
                        if j > 0:
                            outs = _rescaled(outs, last, sx, last_sw, j - 1, COUNT, MAGIC)
                        last = acc
                        last_sw = sw
                    outs = _rescaled(outs, last, sx, last_sw, COUNT - 1, COUNT, MAGIC)
                else:
                    new = ()
                    for j in gl.static_range(COUNT):
                        b = ws[s * G + g].slice(j * NC, NC, 0).permute([1, 0]).load(B)
                        new = new + (mma_v2(a, b, accs[j]),)
                    accs = new
    async_copy.wait_group(0)
    m_y = tm * BM + gl.arange(0, BM, layout=ROW)
    m_c = gl.minimum(m_y, M - 1)
    A16: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B16: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    if SCALES == CHANNEL:
        sx = gl.load(sx_ptr + m_c)
        for j in gl.static_range(COUNT):
            n_j = gl.minimum(tn * BN + j * NC + gl.arange(0, NC, layout=COLUMN), N - 1)
            sw = gl.load(sw_ptr + n_j).to(gl.float32)
            outs = outs + (accs[j].to(gl.float32) * (sx[:, None] * sw[None, :]),)
    if BR > 0:
        m_a = gl.minimum(tm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, A16)), M - 1).to(gl.int64) * ld_low
        for r0 in range(0, R, BR):
            r_a = r0 + gl.arange(0, BR, layout=gl.SliceLayout(0, A16))
            r_b = r0 + gl.arange(0, BR, layout=gl.SliceLayout(1, B16))
            low = gl.load(low_ptr + m_a[:, None] + r_a[None, :], mask=(r_a < R)[None, :], other=0.0)
            new = ()
            for j in gl.static_range(COUNT):
                n_b = gl.minimum(tn * BN + j * NC + gl.arange(0, NC, layout=gl.SliceLayout(0, B16)), N - 1)
                up = gl.load(up_ptr + (n_b * ld_up)[None, :] + r_b[:, None], mask=(r_b < R)[:, None], other=0.0)
                new = new + (mma_v2(low, up.to(low.dtype), outs[j]),)
            outs = new
    yp = y_ptr + (m_y.to(gl.int64) * ldy)[:, None]
    for j in gl.static_range(COUNT):
        n_y = tn * BN + j * NC + gl.arange(0, NC, layout=COLUMN)
        ok = (m_y < M)[:, None] & (n_y < N)[None, :]
        out = outs[j]
        if HAS_BIAS:
            out += gl.load(bias_ptr + n_y, mask=n_y < N, other=0.0).to(gl.float32)[None, :]
        if ACCUMULATE:
            out += gl.load(yp + n_y[None, :], mask=ok, other=0.0).to(gl.float32)
        gl.store(yp + n_y[None, :], out.to(y_ptr.dtype.element_ty), mask=ok)


@gluon.jit
def ampere_s4s4(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    SCALES: gl.constexpr, MAGIC: gl.constexpr, HAS_BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, BR: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, NC: gl.constexpr,
):  # fmt: skip
    _gemm(
        x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldx, ldw, ldy,
        ld_sx, ld_sw, ld_low, ld_up, plane,
        SCALES, MAGIC, HAS_BIAS, ACCUMULATE, BM, BN, G, BR, GROUP_M, STAGES, WM, WN, NC,
    )  # fmt: skip
