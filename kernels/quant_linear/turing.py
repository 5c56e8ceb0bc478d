"""The quantized matrix product for Turing (sm_75) on its INT4 tensor cores, `mma.m8n8k32`, by inline PTX in
Gluon.

`tl.dot` has no int8 or int4 product there, so the fragments are written out. In PTX ISA's "Matrix fragments
for mma.m8n8k32" a lane holds 8 codes, one register, of row lane / 4 of A, and 8 of column lane / 4 of B.
Which channels those are does not matter as long as A and B agree, so a lane reads 8 consecutive bytes of
packed codes, two registers, and four lanes the 32 bytes of a group of 64: whole sectors straight from memory
to registers, in the layout that every other path uses. A warp's 64 x 64 tile reads each of its bytes once,
128 operations a byte, within what the L1 delivers.

Gluon, not Triton, because the layout of lanes must be given.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CHANNEL, SLICE, GROUP = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
_MAGIC = gl.constexpr(12582912.0)
_MAGIC_BITS = gl.constexpr(0x4B400000)


@gluon.constexpr_function
def _mma(unsigned):
    one = f"mma.sync.aligned.m8n8k32.row.col.s32.{'u4' if unsigned else 's4'}.s4.s32"
    return f"{one} {{$0, $1}}, {{$2}}, {{$4}}, {{$6, $7}};\n{one} {{$0, $1}}, {{$3}}, {{$5}}, {{$0, $1}};"


@gluon.jit
def _products(a, b, acc, UNSIGNED: gl.constexpr):
    """acc + A B^T over 64 channels. a, b: two registers of codes a lane; acc: two of int32."""
    return gl.inline_asm_elementwise(
        _mma(UNSIGNED), "=&r,=&r,r,r,r,r,r,r", [a, b, acc], dtype=gl.int32, is_pure=True, pack=2
    )


@gluon.jit
def _fragments(base, offsets, step, COUNT: gl.constexpr):
    out = ()
    for i in gl.static_range(COUNT):
        out = out + (gl.load(base + offsets[i] + step),)
    return out


@gluon.jit
def gemm_m8n8k32(
    x_ptr, w_ptr, sx_ptr, sw_ptr, ends, bias_ptr, y_ptr, M, N, KB, ldx, ldw, ldy, ld_sx, ld_sw,
    UNSIGNED: gl.constexpr, SCALES: gl.constexpr, MAGIC: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    MT: gl.constexpr, NT: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
):  # fmt: skip
    """x (M, KB) and w (N, KB) packed bytes as int32 pointers, strides in int32; KB in bytes, a multiple of
    32. The rest as in `triton.gemm_int8`. A warp computes 8 MT x 8 NT, a block WM x WN warps."""
    L: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WM * WN, 1], [1, 0])
    t = gl.arange(0, 32 * WM * WN, layout=gl.SliceLayout(1, L))
    r = gl.arange(0, 2, layout=gl.SliceLayout(0, L))
    lane, warp = t % 32, t // 32
    m0 = (gl.program_id(0) * WM + warp % WM) * (8 * MT) + lane // 4
    n0 = (gl.program_id(1) * WN + warp // WM) * (8 * NT)
    within = (lane % 4 * 2)[:, None] + r[None, :]
    columns = within + n0[:, None]  # of the result: two a lane
    x_rows, w_rows, outs, accs = (), (), (), ()
    zero = gl.zeros([32 * WM * WN, 2], gl.int32, L)
    start = gl.full([32 * WM * WN, 2], _MAGIC_BITS if MAGIC else 0, gl.int32, L)
    for i in gl.static_range(MT):
        x_rows = x_rows + ((gl.minimum(m0 + 8 * i, M - 1).to(gl.int64) * ldx)[:, None] + within,)
    for j in gl.static_range(NT):
        w_rows = w_rows + ((gl.minimum(n0 + 8 * j + lane // 4, N - 1).to(gl.int64) * ldw)[:, None] + within,)
    for _ in gl.static_range(MT * NT):
        accs = accs + (zero,)
        outs = outs + (zero.to(gl.float32),)

    segment = 0
    end = ends[0] if SCALES == SLICE else KB
    a = _fragments(x_ptr, x_rows, 0, MT)
    b = _fragments(w_ptr, w_rows, 0, NT)
    for k in range(0, KB, 32):
        # The next step's codes are on their way while this one's are multiplied; the last step reads its own
        # again.
        ahead = gl.minimum(k + 32, KB - 32) // 4
        a_next = _fragments(x_ptr, x_rows, ahead, MT)
        b_next = _fragments(w_ptr, w_rows, ahead, NT)
        if SCALES == GROUP:
            sw = ()
            for j in gl.static_range(NT):
                sw = sw + (
                    gl.load(sw_ptr + segment * ld_sw + gl.minimum(columns + 8 * j, N - 1)).to(gl.float32),
                )
            new = ()
            for i in gl.static_range(MT):
                sx = gl.load(sx_ptr + segment * ld_sx + gl.minimum(m0 + 8 * i, M - 1))[:, None]
                for j in gl.static_range(NT):
                    acc = _products(a[i], b[j], start, UNSIGNED)
                    if MAGIC:
                        scaled = gl.fma(acc.to(gl.float32, bitcast=True), sw[j], sw[j] * (-_MAGIC))
                    else:
                        scaled = acc.to(gl.float32) * sw[j]
                    new = new + (gl.fma(scaled, sx + gl.zeros_like(scaled), outs[i * NT + j]),)
            outs = new
            segment += 1
        else:
            new = ()
            for i in gl.static_range(MT):
                for j in gl.static_range(NT):
                    new = new + (_products(a[i], b[j], accs[i * NT + j], UNSIGNED),)
            accs = new
            if SCALES == SLICE:
                if k + 32 == end:
                    outs = _rescale(
                        outs,
                        accs,
                        sx_ptr + segment * ld_sx,
                        sw_ptr + segment * ld_sw,
                        m0,
                        columns,
                        M,
                        N,
                        MT,
                        NT,
                    )
                    new = ()
                    for _ in gl.static_range(MT * NT):
                        new = new + (zero,)
                    accs = new
                    segment += 1
                    for s in gl.static_range(1, 8):
                        if segment == s:
                            end = ends[s]
        a = a_next
        b = b_next
    if SCALES == CHANNEL:
        outs = _rescale(outs, accs, sx_ptr, sw_ptr, m0, columns, M, N, MT, NT)
    for i in gl.static_range(MT):
        m = (m0 + 8 * i)[:, None] + gl.zeros_like(within)
        for j in gl.static_range(NT):
            n = columns + 8 * j
            out = outs[i * NT + j]
            ok = (m < M) & (n < N)
            if HAS_BIAS:
                out += gl.load(bias_ptr + n, mask=ok, other=0.0).to(gl.float32)
            y = y_ptr + m.to(gl.int64) * ldy + n
            if ACCUMULATE:
                out += gl.load(y, mask=ok, other=0.0).to(gl.float32)
            gl.store(y, out.to(y_ptr.dtype.element_ty), mask=ok)


@gluon.jit
def _rescale(outs, accs, sx_ptr, sw_ptr, m0, columns, M, N, MT: gl.constexpr, NT: gl.constexpr):
    """outs + accs * sx * sw, tile by tile."""
    new = ()
    for i in gl.static_range(MT):
        sx = gl.load(sx_ptr + gl.minimum(m0 + 8 * i, M - 1))[:, None]
        for j in gl.static_range(NT):
            sw = gl.load(sw_ptr + gl.minimum(columns + 8 * j, N - 1)).to(gl.float32)
            new = new + (gl.fma(accs[i * NT + j].to(gl.float32), sx * sw, outs[i * NT + j]),)
    return new
