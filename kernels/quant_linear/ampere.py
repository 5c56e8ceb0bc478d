"""The quantized matrix product for sm_80 to sm_89 on `mma.sync`, in Gluon.

What it does better than `triton`, which two barriers a group and scales read from memory by 64-bit addresses
hold back in the model of its machine code (docs/predictions.md):

* Several groups of 64 channels arrive together and have one barrier. Triton's pipeliner keeps its stages in
  one buffer, which its own analysis guards by two barriers a step; here each stage has buffers of its own.
* Scales come through shared memory like codes, copied while earlier groups are multiplied.
* The sums of a chunk of columns are rescaled while those of the next are computed, so that a warp holds the
  integer sums of two chunks and not of its whole tile.

Rows, group scales, low rank and bias are as in `triton`, and so is the arithmetic of each output, in the same
order. Rows of bytes must begin at multiples of 16 bytes and scales at multiples of 16 values; a launch that
does not fit takes `triton`. Kernels whose name ends in s4s4 or u4s4 are rewritten by `native_int4`.

Never run on a card so far: compiled, and compared with the specification on the emulator of tests/ptx.
"""

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
def _wide(a, like):
    a, _ = gl.broadcast(a, like)
    return a


@gluon.jit
def _fetch(
    buffers,
    pointers,
    k,
    KB,
    ld_sx,
    ld_sw,
    SLOT: gl.constexpr,
    G: gl.constexpr,
    SCALES: gl.constexpr,
):
    """Starts the copies of the stage at byte k into its slot; the pointers of the next stage. Past the end
    the last stage is read again, with zeros for what makes its products vanish."""
    xs, ws, sxs, sws = buffers
    xp, wp, sxp, swp = pointers
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
        sxp += gl.where(more, ld_sx * G, 0)
        swp += gl.where(more, ld_sw * G, 0)
    async_copy.commit_group()
    step = gl.where(more, 32 * G, 0)
    return xp + step, wp + step, sxp, swp


@gluon.jit
def _rescaled(outs, acc, sx, sw, J: gl.constexpr, COUNT: gl.constexpr, MAGIC: gl.constexpr):
    """outs with acc * sx * sw added to that of chunk J."""
    if MAGIC:
        f = acc.to(gl.float32, bitcast=True)
        c = sw[None, :]
        t = gl.fma(f, _wide(c, f), _wide(c * (-_MAGIC), f))
        one = gl.fma(t, _wide(sx[:, None], t), outs[J])
    else:
        f = acc.to(gl.float32)
        one = gl.fma(f, sx[:, None] * sw[None, :], outs[J])
    new = ()
    for i in gl.static_range(COUNT):
        new = new + (one if i == J else outs[i],)
    return new


@gluon.jit
def _stage(
    outs,
    accs,
    start,
    buffers,
    SLOT: gl.constexpr,
    G: gl.constexpr,
    SCALES: gl.constexpr,
    MAGIC: gl.constexpr,
    MMA: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    NC: gl.constexpr,
):
    """The products of the G groups in a slot."""
    xs, ws, sxs, sws = buffers
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    COUNT: gl.constexpr = BN // NC
    for g in gl.static_range(G):
        a = xs[SLOT * G + g].load(gl.DotOperandLayout(0, MMA, 4))
        if SCALES == GROUP:
            sx = sxs[SLOT].slice(g * BM, BM).load(gl.SliceLayout(1, MMA))
            before = start
            before_sw = sws[SLOT].slice(g * BN, NC).load(COLUMN).to(gl.float32)
            for j in gl.static_range(COUNT):
                w = ws[SLOT * G + g].slice(j * NC, NC, 0).permute([1, 0]).load(B)
                acc = mma_v2(a, w, start)
                sw = sws[SLOT].slice(g * BN + j * NC, NC).load(COLUMN).to(gl.float32)
                if j > 0:
                    outs = _rescaled(outs, before, sx, before_sw, j - 1, COUNT, MAGIC)
                before = acc
                before_sw = sw
            outs = _rescaled(outs, before, sx, before_sw, COUNT - 1, COUNT, MAGIC)
        else:
            new = ()
            for j in gl.static_range(COUNT):
                w = ws[SLOT * G + g].slice(j * NC, NC, 0).permute([1, 0]).load(B)
                new = new + (mma_v2(a, w, accs[j]),)
            accs = new
    return outs, accs


@gluon.jit
def _low_rank(
    outs,
    low_ptr,
    up_ptr,
    m0,
    n0,
    M,
    N,
    R,
    ld_low,
    ld_up,
    MMA: gl.constexpr,
    BM: gl.constexpr,
    BR: gl.constexpr,
    NC: gl.constexpr,
    COUNT: gl.constexpr,
):
    """outs + low @ up^T, BR of the R columns at a time."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    m = gl.minimum(m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, A)), M - 1).to(gl.int64) * ld_low
    for start in range(0, R, BR):
        r = start + gl.arange(0, BR, layout=gl.SliceLayout(0, A))
        low = gl.load(low_ptr + m[:, None] + r[None, :], mask=(r < R)[None, :], other=0.0)
        r = start + gl.arange(0, BR, layout=gl.SliceLayout(1, B))
        new = ()
        for j in gl.static_range(COUNT):
            n = gl.minimum(n0 + j * NC + gl.arange(0, NC, layout=gl.SliceLayout(0, B)), N - 1) * ld_up
            up = gl.load(up_ptr + n[None, :] + r[:, None], mask=(r < R)[:, None], other=0.0)
            new = new + (mma_v2(low, up.to(low.dtype), outs[j]),)
        outs = new
    return outs


@gluon.jit
def _scaled(
    accs,
    sx_ptr,
    sw_ptr,
    m0,
    n0,
    M,
    N,
    MMA: gl.constexpr,
    BM: gl.constexpr,
    NC: gl.constexpr,
    COUNT: gl.constexpr,
):
    """The integer sums of all chunks times one scale a row and one a column."""
    m = gl.minimum(m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, MMA)), M - 1)
    sx = gl.load(sx_ptr + m)[:, None]
    outs = ()
    for j in gl.static_range(COUNT):
        n = gl.minimum(n0 + j * NC + gl.arange(0, NC, layout=gl.SliceLayout(0, MMA)), N - 1)
        sw = gl.load(sw_ptr + n).to(gl.float32)[None, :]
        outs = outs + (accs[j].to(gl.float32) * (sx * sw),)
    return outs


@gluon.jit
def _pointers(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    m0,
    n0,
    M,
    N,
    ldx,
    ldw,
    ld_sx,
    ld_sw,
    BM: gl.constexpr,
    BN: gl.constexpr,
    G: gl.constexpr,
    WARPS: gl.constexpr,
):
    """What the first stage is copied from: a group of x and of the weights, G groups of their scales. Rows
    past the end repeat the last one, they are not stored; N is even."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [WARPS, 1], [1, 0])
    k = gl.arange(0, 32, layout=gl.SliceLayout(0, COPY))
    m = gl.minimum(m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY)), M - 1)
    n = gl.minimum(n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, COPY)), N - 1)
    i = gl.arange(0, G * BM, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    sxp = sx_ptr + i // BM * ld_sx + gl.minimum(m0 + i % BM, M - 1)
    i = gl.arange(0, G * BN, layout=gl.BlockedLayout([2], [32], [WARPS], [0]))
    columns = gl.max_contiguous(gl.multiple_of(gl.minimum(n0 + i % BN, N - 2), 2), 2)
    xp = x_ptr + (m.to(gl.int64) * ldx)[:, None] + k[None, :]
    wp = w_ptr + (n.to(gl.int64) * ldw)[:, None] + k[None, :]
    return xp, wp, sxp, sw_ptr + i // BN * ld_sw + columns


@gluon.jit
def _store(
    outs,
    bias_ptr,
    y_ptr,
    m0,
    n0,
    M,
    N,
    ldy,
    HAS_BIAS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    MMA: gl.constexpr,
    BM: gl.constexpr,
    NC: gl.constexpr,
    COUNT: gl.constexpr,
):
    """outs with the bias, and with what y holds, into y."""
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, MMA))
    yp = y_ptr + (m.to(gl.int64) * ldy)[:, None]
    for j in gl.static_range(COUNT):
        n = n0 + j * NC + gl.arange(0, NC, layout=gl.SliceLayout(0, MMA))
        ok = (m < M)[:, None] & (n < N)[None, :]
        out = outs[j]
        if HAS_BIAS:
            out += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
        if ACCUMULATE:
            out += gl.load(yp + n[None, :], mask=ok, other=0.0).to(gl.float32)
        gl.store(yp + n[None, :], out.to(y_ptr.dtype.element_ty), mask=ok)


@gluon.jit
def _gemm(
    x_ptr, w_ptr, sx_ptr, sw_ptr, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    SCALES: gl.constexpr, MAGIC: gl.constexpr, HAS_BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BR: gl.constexpr, GROUP_M: gl.constexpr,
    G: gl.constexpr, STAGES: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, NC: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WM, WN], instr_shape=[16, 8])
    TILE: gl.constexpr = gl.SwizzledSharedLayout(16, 4, 2, [1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COUNT: gl.constexpr = BN // NC
    tm, tn = _tile(M, N, BM, BN, GROUP_M)
    m0 = tm * BM
    n0 = tn * BN

    xs, ws, sxs, sws = (), (), (), ()
    for _ in gl.static_range(STAGES * G):
        xs = xs + (gl.allocate_shared_memory(gl.int8, [BM, 32], TILE),)
    for _ in gl.static_range(STAGES * G):
        ws = ws + (gl.allocate_shared_memory(gl.int8, [BN, 32], TILE),)
    if SCALES == GROUP:
        for _ in gl.static_range(STAGES):
            sxs = sxs + (gl.allocate_shared_memory(gl.float32, [G * BM], LINE),)
            sws = sws + (gl.allocate_shared_memory(sw_ptr.dtype.element_ty, [G * BN], LINE),)
    buffers = (xs, ws, sxs, sws)
    pointers = _pointers(
        x_ptr, w_ptr, sx_ptr, sw_ptr, m0, n0, M, N, ldx, ldw, ld_sx, ld_sw, BM, BN, G, WM * WN
    )
    START: gl.constexpr = _MAGIC_BITS if MAGIC else 0
    start = gl.full([BM, NC], START, gl.int32, MMA)
    outs, accs = (), ()
    for _ in gl.static_range(COUNT):
        if SCALES == GROUP:
            outs = outs + (gl.zeros([BM, NC], gl.float32, MMA),)
        else:
            accs = accs + (start,)
    for s in gl.static_range(STAGES - 1):
        pointers = _fetch(buffers, pointers, s * (32 * G), KB, ld_sx, ld_sw, s, G, SCALES)
    for k0 in range(0, KB, 32 * G * STAGES):
        for s in gl.static_range(STAGES):
            async_copy.wait_group(STAGES - 2)
            # Into the slot of the step before, whose readers are all behind this wait's barrier.
            ahead = k0 + (s + STAGES - 1) * (32 * G)
            pointers = _fetch(
                buffers, pointers, ahead, KB, ld_sx, ld_sw, (s + STAGES - 1) % STAGES, G, SCALES
            )
            outs, accs = _stage(outs, accs, start, buffers, s, G, SCALES, MAGIC, MMA, BM, BN, NC)
    async_copy.wait_group(0)

    if SCALES == CHANNEL:
        outs = _scaled(accs, sx_ptr, sw_ptr, m0, n0, M, N, MMA, BM, NC, COUNT)
    if BR > 0:
        outs = _low_rank(outs, low_ptr, up_ptr, m0, n0, M, N, R, ld_low, ld_up, MMA, BM, BR, NC, COUNT)
    _store(outs, bias_ptr, y_ptr, m0, n0, M, N, ldy, HAS_BIAS, ACCUMULATE, MMA, BM, NC, COUNT)


@gluon.jit
def ampere_int8(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    SCALES: gl.constexpr, MAGIC: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACCUMULATE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BR: gl.constexpr, GROUP_M: gl.constexpr,
    G: gl.constexpr, STAGES: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, NC: gl.constexpr,
):  # fmt: skip
    """x and w int8, (M, KB) and (N, KB). sx (segments, M) fp32, sw (segments, N), low (M, R), up
    (N, R), bias (N,), y (M, N). KB is a multiple of 32 G, the bytes of a stage; WM x WN warps, NC columns a
    chunk. Scales: one a row, or one a row and 32 bytes."""
    _gemm(
        x_ptr, w_ptr, sx_ptr, sw_ptr, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldx, ldw, ldy, ld_sx,
        ld_sw, ld_low, ld_up, plane,
        SCALES, MAGIC, HAS_BIAS, ACCUMULATE, BM, BN, BR, GROUP_M, G, STAGES, WM, WN, NC,
    )  # fmt: skip


@gluon.jit
def ampere_s4s4(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    SCALES: gl.constexpr, MAGIC: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACCUMULATE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BR: gl.constexpr, GROUP_M: gl.constexpr,
    G: gl.constexpr, STAGES: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, NC: gl.constexpr,
):  # fmt: skip
    """As `ampere_int8` with x and w packed: its products become `mma.m16n8k64.s4.s4`."""
    _gemm(
        x_ptr, w_ptr, sx_ptr, sw_ptr, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldx, ldw, ldy, ld_sx,
        ld_sw, ld_low, ld_up, plane,
        SCALES, MAGIC, HAS_BIAS, ACCUMULATE, BM, BN, BR, GROUP_M, G, STAGES, WM, WN, NC,
    )  # fmt: skip


@gluon.jit
def ampere_u4s4(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr,
    M, N, KB, R, ldx, ldw, ldy, ld_sx, ld_sw, ld_low, ld_up, plane,
    SCALES: gl.constexpr, MAGIC: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACCUMULATE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BR: gl.constexpr, GROUP_M: gl.constexpr,
    G: gl.constexpr, STAGES: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, NC: gl.constexpr,
):  # fmt: skip
    """As `ampere_s4s4` with unsigned codes of x."""
    _gemm(
        x_ptr, w_ptr, sx_ptr, sw_ptr, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldx, ldw, ldy, ld_sx,
        ld_sw, ld_low, ld_up, plane,
        SCALES, MAGIC, HAS_BIAS, ACCUMULATE, BM, BN, BR, GROUP_M, G, STAGES, WM, WN, NC,
    )  # fmt: skip
