"""y = x . (codes * scale)^T + bias with x in 16 bit. For M of a few rows the time is that of reading the
weights once.

The codes are exact in bf16 and fp16, also 16 or 64 times as large, so a group's products are summed in fp32
and scaled once.
"""

import triton
import triton.language as tl

from ..quant_linear.triton import unpack2, unpack4


@triton.jit
def _product(
    x_ptr, rows, bytes_, codes, plane: tl.constexpr, PLANES: tl.constexpr, acc, m_ok, KB, UPCAST: tl.constexpr
):
    """acc + x[:, channels of this plane] . codes; codes (BK, BN)."""
    ok = m_ok[:, None] & (bytes_ < KB)[None, :]
    x = tl.load(x_ptr + rows[:, None] + (bytes_ * PLANES + plane)[None, :], mask=ok, other=0.0)
    w = codes.to(tl.float32)
    if UPCAST:
        acc = tl.dot(x.to(tl.float32), w, acc, input_precision="ieee")
    else:
        acc = tl.dot(x, w.to(x.dtype), acc)
    return acc


@triton.jit
def weight_only_kernel(
    x_ptr,
    w_ptr,
    sw_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    KB,
    ldx,
    ldw,
    ldy,
    ld_sw,
    PLANES: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x (M, PLANES KB), w (N, KB) bytes, sw (groups or 1, N), bias (N,), y (M, N). GROUPED: BK bytes are one
    group."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n_ok, m_ok = n < N, m < M
    rows = m.to(tl.int64) * ldx
    columns = n.to(tl.int64) * ldw
    out = tl.zeros((BM, BN), dtype=tl.float32)
    GAIN: tl.constexpr = 1.0 if PLANES == 1 else (0.0625 if PLANES == 2 else 0.015625)
    for start in range(0, KB, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(w_ptr + columns[None, :] + k[:, None], mask=n_ok[None, :] & (k < KB)[:, None], other=0)
        acc = tl.zeros((BM, BN), dtype=tl.float32) if GROUPED else out
        if PLANES == 1:
            acc = _product(x_ptr, rows, k, w, 0, PLANES, acc, m_ok, KB, UPCAST)
        elif PLANES == 2:
            w0, w1 = unpack2(w, ASM)
            acc = _product(x_ptr, rows, k, w0, 0, PLANES, acc, m_ok, KB, UPCAST)
            acc = _product(x_ptr, rows, k, w1, 1, PLANES, acc, m_ok, KB, UPCAST)
        else:
            w0, w1, w2, w3 = unpack4(w, ASM)
            acc = _product(x_ptr, rows, k, w0, 0, PLANES, acc, m_ok, KB, UPCAST)
            acc = _product(x_ptr, rows, k, w1, 1, PLANES, acc, m_ok, KB, UPCAST)
            acc = _product(x_ptr, rows, k, w2, 2, PLANES, acc, m_ok, KB, UPCAST)
            acc = _product(x_ptr, rows, k, w3, 3, PLANES, acc, m_ok, KB, UPCAST)
        if GROUPED:
            sw = tl.load(sw_ptr + (start // BK) * ld_sw + n, mask=n_ok, other=0.0).to(tl.float32) * GAIN
            out += acc * sw[None, :]
        else:
            out = acc
    if not GROUPED:
        out *= (tl.load(sw_ptr + n, mask=n_ok, other=0.0).to(tl.float32) * GAIN)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + m[:, None].to(tl.int64) * ldy + n[None, :]
    tl.store(y, out.to(y_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])
