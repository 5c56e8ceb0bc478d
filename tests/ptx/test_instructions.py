"""Arithmetic, bit and conversion instructions against numpy, torch or the ISA's pseudocode bit by bit."""

import numpy as np
import pytest
import torch

from comfyui_nibble.tests.ptx.errors import EmulationError
from comfyui_nibble.tests.ptx.handwritten import compute

THREADS = 128


def words(seed: int, dtype=np.uint32, count: int = THREADS) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, count, dtype=dtype, endpoint=True)


def floats(*values: float) -> np.ndarray:
    return np.resize(np.array(values, np.float32), 32)


def test_prmt_picks_bytes_and_signs():
    a, b, selector = words(1), words(2), words(3)
    found = compute("prmt.b32 %y0, %a0, %b0, %c0;", a, b, selector)
    for x, y, s, d in zip(a.tolist(), b.tolist(), selector.tolist(), found.tolist(), strict=True):
        source = (y << 32 | x).to_bytes(8, "little")
        nibbles = [s >> 4 * i & 15 for i in range(4)]
        picked = [(0xFF if source[n & 7] & 0x80 else 0) if n & 8 else source[n & 7] for n in nibbles]
        assert d == int.from_bytes(bytes(picked), "little")
    assert (compute("prmt.b32 %y0, %a0, 0, 0x7770U;", a) == (a & 0xFF)).all()


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x96, 0xEA, 0x2D])
def test_lop3_against_its_table(table):
    a, b, c = words(1), words(2), words(3)
    index = np.zeros((THREADS, 32), np.int64)
    for x in (a, b, c):
        index = index << 1 | (x[:, None] >> np.arange(32, dtype=np.uint32) & 1)
    bits = (table >> index & 1).astype(np.uint64)
    expected = (bits << np.arange(32, dtype=np.uint64)).sum(1)
    np.testing.assert_array_equal(compute(f"lop3.b32 %y0, %a0, %b0, %c0, {table:#x};", a, b, c), expected)


def test_lop3_random_table_is_bit_arithmetic():
    a, b, c = words(4), words(5), words(6)
    found = compute("lop3.b32 %y0, %a0, %b0, %c0, 0xD8;", a, b, c)
    np.testing.assert_array_equal(found, (a & ~c) | (b & c))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("u32", np.uint32), ("s32", np.uint32), ("u64", np.uint64), ("s64", np.uint64)]
)
def test_bfe_against_the_pseudocode(kind, dtype):
    rng, width = np.random.default_rng(7), 8 * np.dtype(dtype).itemsize
    a = words(8, dtype)
    position, length = (rng.integers(0, width + 8, THREADS).astype(np.uint32) for _ in "bc")
    found = compute(f"bfe.{kind} %y0, %a0, %b0, %c0;", a, position, length, dtype=dtype)
    for x, p, n, d in zip(a.tolist(), position.tolist(), length.tolist(), found.tolist(), strict=True):
        sign = x >> min(p + n - 1, width - 1) & 1 if kind[0] == "s" and n else 0
        bits = [x >> p + i & 1 if i < n and p + i < width else sign for i in range(width)]
        assert d == sum(bit << i for i, bit in enumerate(bits)), (x, p, n)


def test_bfi_against_the_pseudocode():
    rng, a, b = np.random.default_rng(9), words(10), words(11)
    position, length = (rng.integers(0, 40, THREADS).astype(np.uint32) for _ in "pl")
    found = compute("bfi.b32 %y0, %a0, %b0, %c0, %e0;", a, b, position, length)
    for x, y, p, n, d in zip(
        a.tolist(), b.tolist(), position.tolist(), length.tolist(), found.tolist(), strict=True
    ):
        taken = {p + i: x >> i & 1 for i in range(n) if p + i < 32}
        assert d == sum(taken.get(i, y >> i & 1) << i for i in range(32)), (x, y, p, n)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_the_width_and_more(bits):
    signed, unsigned = np.dtype(f"i{bits // 8}").type, np.dtype(f"u{bits // 8}").type
    x = words(12, unsigned)
    amount = np.resize(np.array([0, 1, bits - 1, bits, bits + 1, 200, 2**31], np.uint32), THREADS)
    inside = amount < bits
    capped = np.minimum(amount, bits - 1)
    left = compute(f"shl.b{bits} %y0, %a0, %b0;", x, amount, dtype=unsigned)
    np.testing.assert_array_equal(left, np.where(inside, x << capped.astype(unsigned), 0))
    right = compute(f"shr.u{bits} %y0, %a0, %b0;", x, amount, dtype=unsigned)
    np.testing.assert_array_equal(right, np.where(inside, x >> capped.astype(unsigned), 0))
    arithmetic = compute(f"shr.s{bits} %y0, %a0, %b0;", x, amount, dtype=signed)
    np.testing.assert_array_equal(arithmetic, x.view(signed) >> capped.astype(signed))


def test_integer_arithmetic():
    a, b = words(13, np.int32), words(14, np.int32)
    wide = a.astype(np.int64) * b
    assert (compute("mul.lo.s32 %y0, %a0, %b0;", a, b, dtype=np.int32) == wide.astype(np.int32)).all()
    assert (compute("mul.hi.s32 %y0, %a0, %b0;", a, b, dtype=np.int32) == wide >> 32).all()
    assert (compute("mul.wide.s32 %y0, %a0, %b0;", a, b, dtype=np.int64) == wide).all()
    assert (compute("mad.wide.s32 %y0, %a0, %b0, %c0;", a, b, wide, dtype=np.int64) == 2 * wide).all()
    quotient = np.trunc(a / b.astype(float)).astype(np.int64)
    assert (compute("div.s32 %y0, %a0, %b0;", a, b, dtype=np.int32) == quotient).all()
    assert (compute("rem.s32 %y0, %a0, %b0;", a, b, dtype=np.int32) == a - quotient * b).all()
    high = [int(x) * int(y) >> 64 for x, y in zip(wide.tolist(), wide[::-1].tolist(), strict=True)]
    assert (compute("mul.hi.s64 %y0, %a0, %b0;", wide, wide[::-1], dtype=np.int64) == high).all()


def test_bit_counts():
    a = np.concatenate([[0, 1, 2**31], words(15)[:29]]).astype(np.uint32)
    assert compute("popc.b32 %y0, %a0;", a).tolist() == [int(x).bit_count() for x in a]
    assert compute("clz.b32 %y0, %a0;", a).tolist() == [32 - int(x).bit_length() for x in a]
    assert compute("brev.b32 %y0, %a0;", a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in a]


def test_bf16_rounds_half_to_even():
    ties = (np.arange(32, dtype=np.uint32) << 16) + 0x3F80_8000
    finite = words(16, count=32) & 0xFF7F_FFFF
    a = np.concatenate([ties, ties + 1, ties - 1, finite]).astype(np.uint32)
    expected = torch.from_numpy(a.view(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(compute("cvt.rn.bf16.f32 %y0, %a0;", a, dtype=np.uint16), expected)
    pair = compute("cvt.rn.bf16x2.f32 %y0, %a0, %b0;", a, a[::-1])
    np.testing.assert_array_equal(pair, expected.astype(np.uint32) << 16 | expected[::-1])
    np.testing.assert_array_equal(compute("cvt.rz.bf16.f32 %y0, %a0;", a, dtype=np.uint16), a >> 16)
    assert (compute("cvt.rn.bf16.f32 %y0, %a0;", floats(np.nan), dtype=np.uint16) == 0x7FFF).all()


def test_f16_conversions():
    a = floats(1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, 2**-25, 3 * 2**-25, -0.0, 1e-9)
    with np.errstate(over="ignore"):
        expected = a.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(compute("cvt.rn.f16.f32 %y0, %a0;", a, dtype=np.uint16), expected)
    back = compute("cvt.rz.f16.f32 %y0, %a0;", a, dtype=np.uint16).view(np.float16)
    assert back[:6].tolist() == [1, 1 + 2**-10, 65504, 65504, 0, 2**-24]


def test_float_to_integer_rounds_and_saturates():
    a = floats(0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, np.nan)
    top, bottom = 2**31 - 1, -(2**31)
    assert compute("cvt.rni.s32.f32 %y0, %a0;", a, dtype=np.int32)[:8].tolist() == [
        0,
        2,
        2,
        0,
        -2,
        top,
        bottom,
        0,
    ]
    assert compute("cvt.rzi.s32.f32 %y0, %a0;", a, dtype=np.int32)[:8].tolist() == [
        0,
        1,
        2,
        0,
        -1,
        top,
        bottom,
        0,
    ]
    assert compute("cvt.rmi.f32.f32 %y0, %a0;", a, dtype=np.float32)[:5].tolist() == [0, 1, 2, -1, -2]
    a = words(17, np.int32)
    np.testing.assert_array_equal(
        compute("cvt.rn.f32.s32 %y0, %a0;", a, dtype=np.float32), a.astype(np.float32)
    )


def test_integer_conversions_take_low_bits_and_extend():
    a = words(18)
    assert (compute("cvt.s32.s8 %y0, %a0;", a, dtype=np.int32) == a.astype(np.uint8).view(np.int8)).all()
    assert (compute("cvt.u32.u16 %y0, %a0;", a) == (a & 0xFFFF)).all()
    assert (
        compute("cvt.sat.s8.s32 %y0, %a0;", a, dtype=np.int32) == np.clip(a.view(np.int32), -128, 127)
    ).all()


def test_fma_rounds_once():
    """1 + 2^-23 plus a product just below half a unit: rounding the sum to float64 first would make it a tie,
    and round it up."""
    x, y, z = floats(2**-24 * (1 + 2**-23)), floats(1 - 2**-23), floats(1 + 2**-23)
    naive = (x.astype(np.float64) * y + z).astype(np.float32)
    assert naive[0] == np.float32(1 + 2**-22)
    assert (compute("fma.rn.f32 %y0, %a0, %b0, %c0;", x, y, z, dtype=np.float32) == z).all()


def test_bf16_fma_rounds_once():
    """259 - 2^-20 lies below the tie of 258 and 260, but f32 cannot tell it from the tie."""
    pair = lambda v: (floats(v).view(np.uint32) >> 16) * np.uint32(0x10001)
    found = compute("fma.rn.bf16x2 %y0, %a0, %b0, %c0;", pair(7), pair(37), pair(-(2**-20)))
    assert (found == pair(258)).all()


def test_packed_halves():
    rng = np.random.default_rng(19)
    x, y = (rng.standard_normal((32, 2)).astype(np.float16) for _ in "xy")
    packed = [v.view(np.uint32)[:, 0] for v in (x, y)]
    found = compute("fma.rn.f16x2 %y0, %a0, %b0, %a0;", *packed).view(np.float16).reshape(32, 2)
    np.testing.assert_array_equal(found, (x.astype(np.float64) * y + x).astype(np.float16))
    chosen = """
        setp.gt.f16x2 %p0|%p1, %a0, %b0;
        selp.b32 %y0, 1, 0, %p0;
        selp.b32 %y1, 1, 0, %p1;"""
    np.testing.assert_array_equal(compute(chosen, *packed, results=2), x > y)
    np.testing.assert_array_equal(
        compute("neg.f16x2 %y0, %a0;", packed[0]).view(np.float16).reshape(32, 2), -x
    )


def test_extremes_of_nans_and_zeros():
    x, y = floats(1, np.nan, 2, -0.0, 0.0), floats(2, 3, np.nan, 0.0, -0.0)
    largest = compute("max.f32 %y0, %a0, %b0;", x, y, dtype=np.float32)[:5]
    assert largest.tolist() == [2, 3, 2, 0, 0]
    assert not np.signbit(largest).any()
    assert np.signbit(compute("min.f32 %y0, %a0, %b0;", x, y, dtype=np.float32)[3:5]).all()
    assert np.isnan(compute("max.NaN.f32 %y0, %a0, %b0;", x, y, dtype=np.float32)[1:3]).all()


def test_float_comparisons_with_nan():
    x, y = floats(1, np.nan), floats(2, 2)
    truth = {
        "lt": [1, 0],
        "ge": [0, 0],
        "ltu": [1, 1],
        "geu": [0, 1],
        "nan": [0, 1],
        "num": [1, 0],
        "ne": [1, 0],
        "neu": [1, 1],
    }
    for name, expected in truth.items():
        found = compute(f"setp.{name}.f32 %p0, %a0, %b0; selp.b32 %y0, 1, 0, %p0;", x, y)
        assert found[:2].tolist() == expected, name


def test_setp_combines_with_a_predicate():
    a = np.arange(32, dtype=np.uint32)
    code = (
        "setp.lt.u32 %p0, %a0, 20; setp.gt.and.u32 %p1|%p2, %a0, 10, %p0; selp.b32 %y0, 1, 0, %p1; "
        "selp.b32 %y1, 1, 0, %p2;"
    )
    np.testing.assert_array_equal(
        compute(code, a, results=2), np.stack([(a < 20) & (a > 10), (a < 20) & ~(a > 10)], 1)
    )


def test_vector_moves():
    a = words(20, count=32)
    code = (
        "mov.b32 {%h0, %h1}, %a0; mov.b32 %y0, {%h1, %h0}; mov.b64 %d0, {%a0, %y0}; shr.u64 %d0, %d0, 32; "
        "cvt.u32.u64 %y1, %d0;"
    )
    found = compute(code, a, results=2)
    assert (found == (a >> 16 | a << 16)[:, None]).all()


@pytest.mark.parametrize(
    ("mode", "step", "clamp", "source"),
    [
        ("bfly", 4, 0x1F, lambda i: i ^ 4),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("down", 5, 0x1F, lambda i: i + 5 if i < 27 else i),
        ("idx", 7, 0x1F, lambda i: 7),
        ("idx", 2, 0x181F, lambda i: i // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, step, clamp, source):
    a = words(21, count=64)
    found = compute(f"shfl.sync.{mode}.b32 %y0, %a0, {step}, {clamp}, -1;", a)
    np.testing.assert_array_equal(found, [a[i // 32 * 32 + source(i % 32)] for i in range(64)])


def test_reductions_stay_in_their_warp():
    a = words(22, np.int32, 64)
    found = compute("redux.sync.max.s32 %y0, %a0, -1;", a, dtype=np.int32)
    np.testing.assert_array_equal(found, np.repeat(a.reshape(2, 32).max(1), 32))
    with pytest.raises(EmulationError, match="member mask"):
        compute("redux.sync.max.s32 %y0, %a0, 255;", a)
