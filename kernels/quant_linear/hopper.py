"""The quantized matrix product for Hopper (sm_90) on int8 wgmma, in Gluon. Optional: taken where it was
measured faster than Triton's.

Triton's pipeliner waits for every int8 wgmma before the next step of its main loop. Here the tensor cores
never wait for the codes: a step of packed weights is two products, low nibbles with the first plane of x and
high nibbles with the second. While one of them runs, the registers of the other are filled again, and while
both run, the next copy is started and the next weights are read. Each product is waited for before its
registers or its shared memory are written again, and never earlier.

As in `triton` with SWAP: y^T = W x^T, packed weights go from shared memory to registers, where a nibble
shifted to the top of its byte is 16 times its value, and x stays int8 in shared memory. 8-bit weights stay
there too, and a step is one product.

Tiles arrive by TMA, STAGES of them in a ring, each with a barrier of its own that counts its bytes. TMA
writes zeros past the end of a tensor, so that neither rows nor channels are masked: weights of 0 cancel
whatever x has beside them. The low rank stays in this kernel, on 16-bit wgmma: a product of its own would
read and write all of y once more, at 3072 in-channels a quarter of the int8 product's time by the card's
figures.

Never run on a card so far, only compiled. `nibble bench --all` compares its output with the specification
and with the default kernel's before it may be chosen.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

CHANNEL, SLICE = gl.constexpr(0), gl.constexpr(1)
# Triton 3.9 has other names for the two.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


def tile_layout(bk: int) -> gl.NVMMASharedLayout:
    """Of an int8 tile with rows of bk bytes (32, 64 or 128), as TMA writes it and wgmma reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=bk, element_bitwidth=8, rank=2)


@gluon.jit
def _tile(M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP_M: gl.constexpr):
    """As in `triton._tile`."""
    pid = gl.program_id(0)
    rows, columns = gl.cdiv(M, BM), gl.cdiv(N, BN)
    band = pid // (GROUP_M * columns)
    height = gl.minimum(rows - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * columns)
    return band * GROUP_M + within % height, within // height


# Not pure, which keeps them behind the wait for the product that still reads the registers they write.
@gluon.jit
def _low(w):
    """Bytes of two signed 4-bit codes -> 16 times the low one, int8."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r",
        [w],
        dtype=gl.int8,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _high(w):
    """Bytes of two signed 4-bit codes -> 16 times the high one, int8."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [w], dtype=gl.int8, is_pure=False, pack=4
    )


@gluon.jit
def _fetch(
    x_desc, w_desc, xs, ws, full, step, steps, m0, n0, plane, PLANES: gl.constexpr, STAGES: gl.constexpr
):
    """Starts the copies of one step, if there is such a step. xs (STAGES * PLANES, BM, BK), ws (STAGES, BN,
    BK)."""
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = w_desc.block_type.shape[1]
    slot = step % STAGES
    there = step < steps
    mbarrier.expect(full.index(slot), BK * (BM * PLANES + BN), pred=there)
    _copy(w_desc, [n0, step * BK], full.index(slot), ws.index(slot), pred=there)
    for p in gl.static_range(PLANES):
        _copy(x_desc, [m0, p * plane + step * BK], full.index(slot), xs.index(slot * PLANES + p), pred=there)


@gluon.jit
def _products(
    acc,
    first,
    last,
    x_desc,
    w_desc,
    xs,
    ws,
    full,
    steps,
    m0,
    n0,
    plane,
    PLANES: gl.constexpr,
    STAGES: gl.constexpr,
    W: gl.constexpr,
):
    """acc plus the products of the steps first..last, the latest of which may still run. W: the registers'
    layout of packed weights."""
    if PLANES == 2:
        acc = warpgroup_mma_init(acc)
    for step in range(first, last):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        if PLANES == 2:
            packed = ws.index(slot).load(W)
            # The low nibbles of the step before are done, the high ones run.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            acc = warpgroup_mma(_low(packed), xs.index(2 * slot).permute((1, 0)), acc, is_async=True)
            # The high nibbles of the step before are done, the low ones run.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            acc = warpgroup_mma(_high(packed), xs.index(2 * slot + 1).permute((1, 0)), acc, is_async=True)
        else:
            acc = warpgroup_mma(ws.index(slot), xs.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done, this one runs
        _barrier()  # all warps are done with the slot of the step before
        _fetch(x_desc, w_desc, xs, ws, full, step - 1 + STAGES, steps, m0, n0, plane, PLANES, STAGES)
    return acc


@gluon.jit
def _scaled(out, acc, sx_ptr, sw_ptr, m, n, M, N, PLANES: gl.constexpr):
    """out + acc * sx * sw."""
    acc = gl.convert_layout(acc.to(gl.float32), out.type.layout, assert_trivial=True)
    sx = gl.load(sx_ptr + m, mask=m < M, other=0.0)
    sw = gl.load(sw_ptr + n, mask=n < N, other=0.0).to(gl.float32) * (0.0625 if PLANES == 2 else 1.0)
    # One factor after the other: all products of the two at once do not fit the registers.
    return gl.fma(acc * sw[:, None], sx[None, :], out)


@gluon.jit
def _low_rank(
    out, low_ptr, up_ptr, m0, n0, M, N, R, ld_low, ld_up,
    BM: gl.constexpr, BN: gl.constexpr, BR: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """out + up @ low^T, BR of the R columns at a time."""
    dtype: gl.constexpr = low_ptr.dtype.element_ty
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BR, BR // 8], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * BR, element_bitwidth=16, rank=2)
    lows = gl.allocate_shared_memory(dtype, [BM, BR], SHARED)
    ups = gl.allocate_shared_memory(dtype, [BN, BR], SHARED)
    m_low = gl.minimum(m0 + gl.arange(0, BM, gl.SliceLayout(1, LOAD)), M - 1).to(gl.int64) * ld_low
    n_up = gl.minimum(n0 + gl.arange(0, BN, gl.SliceLayout(1, LOAD)), N - 1) * ld_up
    for start in range(0, R, BR):
        r = start + gl.arange(0, BR, gl.SliceLayout(0, LOAD))
        lows.store(gl.load(low_ptr + m_low[:, None] + r[None, :], mask=(r < R)[None, :], other=0.0))
        ups.store(gl.load(up_ptr + n_up[:, None] + r[None, :], mask=(r < R)[None, :], other=0.0).to(dtype))
        fence_async_shared()
        _barrier()
        out = warpgroup_mma(ups, lows.permute((1, 0)), out, is_async=True)
        out = warpgroup_mma_wait(0, deps=(out,))
        _barrier()
    return out


@gluon.jit
def gemm_wgmma(
    x_desc, w_desc, sx_ptr, sw_ptr, ends, low_ptr, up_ptr, bias_ptr, y_ptr, M, N, KB, R, ldy, ld_sx, ld_sw,
    ld_low, ld_up, plane,
    PLANES: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, ACCUMULATE: gl.constexpr,
    BR: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x_desc, w_desc: TMA descriptors of x (M, PLANES KB) and w (N, KB) with blocks of BM x BK and BN x BK
    bytes. The rest as in `triton.gemm_int8`; SCALES is CHANNEL or SLICE, PLANES 1 or 2."""
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = w_desc.block_type.shape[1]
    # Triton has no int8 wgmma of 256 columns. The sums of int8 and 16-bit products lie in the same registers.
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, min(BM, 128), 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, min(BM, 128), 16])
    W: gl.constexpr = gl.DotOperandLayout(0, ACC, 4)
    tm, tn = _tile(M, N, BM, BN, GROUP_M)
    m0, n0 = tm * BM, tn * BN
    xs = gl.allocate_shared_memory(gl.int8, [STAGES * PLANES, BM, BK], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    _barrier()
    steps = gl.cdiv(KB, BK)
    for step in gl.static_range(STAGES - 1):
        _fetch(x_desc, w_desc, xs, ws, full, step, steps, m0, n0, plane, PLANES, STAGES)

    # Without a way around the loops: where such a way joins their sums with others, ptxas waits for every
    # single wgmma.
    gl.assume(steps > 0)
    m = gl.arange(0, BM, gl.SliceLayout(0, OUT))
    n = gl.arange(0, BN, gl.SliceLayout(1, OUT))
    out = gl.zeros([BN, BM], gl.float32, OUT)
    if SCALES == CHANNEL:
        acc = gl.zeros([BN, BM], gl.int32, ACC)
        acc = _products(acc, 0, steps, x_desc, w_desc, xs, ws, full, steps, m0, n0, plane, PLANES, STAGES, W)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        out = _scaled(out, acc, sx_ptr + m0, sw_ptr + n0, m, n, M - m0, N - n0, PLANES)
    else:
        segments = 0
        for i in gl.static_range(8):
            segments += (ends[i] > 0).to(gl.int32)
        first = 0
        for segment in range(segments):
            last = ends[0]
            for i in gl.static_range(1, 8):
                last = gl.where(segment == i, ends[i], last)
            last = last // BK
            gl.assume(last > first)
            acc = gl.zeros([BN, BM], gl.int32, ACC)
            acc = _products(
                acc, first, last, x_desc, w_desc, xs, ws, full, steps, m0, n0, plane, PLANES, STAGES, W
            )
            acc = warpgroup_mma_wait(0, deps=(acc,))
            out = _scaled(
                out,
                acc,
                sx_ptr + segment * ld_sx + m0,
                sw_ptr + segment * ld_sw + n0,
                m,
                n,
                M - m0,
                N - n0,
                PLANES,
            )
            first = last
    _barrier()  # the shared memory of the main loop is free for other uses
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(slot))
    if BR > 0:
        out = _low_rank(out, low_ptr, up_ptr, m0, n0, M, N, R, ld_low, ld_up, BM, BN, BR, WARPS)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + n0 + n, mask=n < N - n0, other=0.0).to(gl.float32)
        out += bias[:, None]

    # To the layout in which neighbouring lanes have neighbouring channels.
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [BN // 8, 256 // BN], [1, WARPS], [0, 1])
    m_y = m0 + gl.arange(0, BM, gl.SliceLayout(0, STORE))
    n_y = n0 + gl.arange(0, BN, gl.SliceLayout(1, STORE))
    y = y_ptr + m_y.to(gl.int64)[None, :] * ldy + n_y[:, None]
    ok = (m_y < M)[None, :] & (n_y < N)[:, None]
    if ACCUMULATE:
        out += gl.convert_layout(gl.load(y, mask=ok, other=0.0), OUT).to(gl.float32)
    gl.store(y, gl.convert_layout(out.to(y_ptr.dtype.element_ty), STORE), mask=ok)
