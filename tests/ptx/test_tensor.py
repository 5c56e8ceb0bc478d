"""mma and ldmatrix against the fragment tables of the PTX ISA, written out element by element as the tables
have them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from comfyui_nibble.tests.ptx.errors import EmulationError
from comfyui_nibble.tests.ptx.handwritten import compute


class Table(NamedTuple):
    """Element i of a lane's fragment: g is lane / 4, t is lane % 4. `rows` and `inner` are the sizes of A."""

    rows: int
    inner: int
    a_count: int
    a_row: Callable
    a_column: Callable
    b_count: int
    b_row: Callable


def _two_rows(first: int, period: int):
    """ "groupID for the first elements of each period, groupID + 8 otherwise"."""
    return lambda g, i: g if i % period < first else g + 8


TABLES = {
    ("m16n8k64", 4): Table(
        16,
        64,
        32,
        _two_rows(8, 16),
        lambda t, i: t * 8 + i % 8 + 32 * (i >= 16),
        16,
        lambda t, i: t * 8 + i % 8 + 32 * (i >= 8),
    ),
    ("m16n8k32", 4): Table(
        16, 32, 16, _two_rows(8, 16), lambda t, i: t * 8 + i % 8, 8, lambda t, i: t * 8 + i
    ),
    ("m8n8k32", 4): Table(8, 32, 8, lambda g, i: g, lambda t, i: t * 8 + i, 8, lambda t, i: t * 8 + i),
    ("m16n8k32", 8): Table(
        16,
        32,
        16,
        _two_rows(4, 8),
        lambda t, i: t * 4 + i % 4 + 16 * (i >= 8),
        8,
        lambda t, i: t * 4 + i % 4 + 16 * (i >= 4),
    ),
    ("m16n8k16", 8): Table(16, 16, 8, _two_rows(4, 8), lambda t, i: t * 4 + i % 4, 4, lambda t, i: t * 4 + i),
    ("m8n8k16", 8): Table(8, 16, 4, lambda g, i: g, lambda t, i: t * 4 + i, 4, lambda t, i: t * 4 + i),
    ("m16n8k16", 16): Table(
        16,
        16,
        8,
        _two_rows(2, 4),
        lambda t, i: t * 2 + i % 2 + 8 * (i >= 4),
        4,
        lambda t, i: t * 2 + i % 2 + 8 * (i >= 2),
    ),
    ("m16n8k8", 16): Table(16, 8, 4, _two_rows(2, 4), lambda t, i: t * 2 + i % 2, 2, lambda t, i: t * 2 + i),
    ("m16n8k8", 32): Table(
        16, 8, 4, _two_rows(1, 2), lambda t, i: t + 4 * (i >= 2), 2, lambda t, i: t + 4 * i
    ),
}
LANES = [(lane // 4, lane % 4) for lane in range(32)]
BITS = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "tf32": 32}


def registers(elements: np.ndarray, bits: int) -> np.ndarray:
    """(32, registers) from (32, elements) of unsigned bit patterns, the first element lowest."""
    per = 32 // bits
    grouped = elements.reshape(32, -1, per).astype(np.uint64) << (np.arange(per) * bits).astype(np.uint64)
    return grouped.sum(2).astype(np.uint32)


def patterns(values: np.ndarray, kind: str) -> np.ndarray:
    """The bits of values that the type holds exactly."""
    if kind in ("f16", "tf32"):
        return (
            values.astype(np.float16).view(np.uint16)
            if kind == "f16"
            else values.astype(np.float32).view(np.uint32)
        )
    if kind == "bf16":
        return values.astype(np.float32).view(np.uint32) >> 16
    return values.astype(np.int64) & (1 << BITS[kind]) - 1


def multiply(
    opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, a_kind: str, b_kind: str, guard: str = ""
) -> np.ndarray:
    """D of one warp, through fragments built from the table."""
    table = TABLES[opcode.split(".")[3], BITS[a_kind]]
    fa = np.array(
        [[a[table.a_row(g, i), table.a_column(t, i)] for i in range(table.a_count)] for g, t in LANES]
    )
    fb = np.array([[b[table.b_row(t, i), g] for i in range(table.b_count)] for g, t in LANES])
    ra, rb = registers(patterns(fa, a_kind), BITS[a_kind]), registers(patterns(fb, b_kind), BITS[b_kind])
    places = [[(g + 8 * (i >= 2), t * 2 + i % 2) for i in range(table.rows // 4)] for g, t in LANES]
    rc = np.array([[c[p] for p in row] for row in places]).view(np.uint32)
    vectors = [
        "{" + ", ".join(f"%{name}{j}" for j in range(n)) + "}"
        for name, n in zip("yabc", (rc.shape[1], ra.shape[1], rb.shape[1], rc.shape[1]), strict=True)
    ]
    out = compute(f"{guard}{opcode} {', '.join(vectors)};", ra, rb, rc, results=rc.shape[1]).view(c.dtype)
    found = np.zeros_like(c)
    for row, values in zip(places, out, strict=True):
        for place, value in zip(row, values, strict=True):
            found[place] = value
    return found


def integers(kind: str, shape: tuple, seed: int) -> np.ndarray:
    """Random values, the first of which run through the whole range, so that every bit pattern occurs."""
    low, size = (-(1 << BITS[kind] - 1) if kind[0] == "s" else 0), 1 << BITS[kind]
    values = np.random.default_rng(seed).integers(low, low + size, shape, dtype=np.int64)
    every = np.arange(low, low + size)[: values.size]
    values.flat[: len(every)] = every
    return values


INTEGER_CASES = [
    ("m16n8k64", "s4", "s4"),
    ("m16n8k64", "u4", "s4"),
    ("m16n8k64", "u4", "u4"),
    ("m16n8k32", "s4", "s4"),
    ("m8n8k32", "s4", "s4"),
    ("m8n8k32", "u4", "s4"),
    ("m16n8k32", "s8", "s8"),
    ("m16n8k32", "u8", "s8"),
    ("m16n8k16", "s8", "s8"),
    ("m8n8k16", "s8", "s8"),
]


@pytest.mark.parametrize("satfinite", ["", ".satfinite"])
@pytest.mark.parametrize(("shape", "a_kind", "b_kind"), INTEGER_CASES)
def test_integer_products_are_exact(shape, a_kind, b_kind, satfinite):
    table = TABLES[shape, BITS[a_kind]]
    a, b = integers(a_kind, (table.rows, table.inner), 1), integers(b_kind, (table.inner, 8), 2)
    c = np.random.default_rng(3).integers(-(2**20), 2**20, (table.rows, 8), dtype=np.int32)
    opcode = f"mma.sync.aligned.{shape}.row.col{satfinite}.s32.{a_kind}.{b_kind}.s32"
    np.testing.assert_array_equal(multiply(opcode, a, b, c, a_kind, b_kind), a @ b + c)


def test_the_lowest_code_times_itself():
    a, b, c = np.full((16, 64), -8), np.full((64, 8), -8), np.zeros((16, 8), np.int32)
    assert (multiply("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", a, b, c, "s4", "s4") == 64 * 64).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_satfinite_clamps_where_the_plain_form_wraps(sign):
    a, b = np.full((16, 64), 7), np.full((64, 8), 7 * sign)
    c = np.full((16, 8), 2**31 - 1 if sign > 0 else -(2**31), np.int32)
    opcode = "mma.sync.aligned.m16n8k64.row.col{}.s32.s4.s4.s32"
    assert (multiply(opcode.format(".satfinite"), a, b, c, "s4", "s4") == c).all()
    wrapped = (c.astype(np.int64) + 64 * 49 * sign).astype(np.int32)
    assert (multiply(opcode.format(""), a, b, c, "s4", "s4") == wrapped).all()


FLOAT_CASES = [
    ("m16n8k16", "bf16"),
    ("m16n8k16", "f16"),
    ("m16n8k8", "f16"),
    ("m16n8k8", "bf16"),
    ("m16n8k8", "tf32"),
]


@pytest.mark.parametrize(("shape", "kind"), FLOAT_CASES)
def test_float_products(shape, kind):
    """Multiples of 1/8 up to 16, whose products and sums are exact in f32."""
    table, rng = TABLES[shape, BITS[kind]], np.random.default_rng(4)
    a, b = (
        rng.integers(-128, 128, (table.rows, table.inner)) / 8,
        rng.integers(-128, 128, (table.inner, 8)) / 8,
    )
    c = rng.integers(-1000, 1000, (table.rows, 8)).astype(np.float32)
    opcode = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"
    np.testing.assert_array_equal(multiply(opcode, a, b, c, kind, kind), a @ b + c)


def test_a_shape_that_the_type_does_not_have():
    a, b, c = np.zeros((16, 64)), np.zeros((64, 8)), np.zeros((16, 8), np.int32)
    with pytest.raises(NotImplementedError, match=r"m16n8k64.row.col.f32.s4.s4.f32"):
        multiply("mma.sync.aligned.m16n8k64.row.col.f32.s4.s4.f32", a, b, c, "s4", "s4")


def test_mma_needs_the_whole_warp():
    a, b, c = np.zeros((16, 64)), np.zeros((64, 8)), np.zeros((16, 8), np.int32)
    guard = "setp.lt.u32 %p0, %r15, 8; @%p0 "
    with pytest.raises(EmulationError, match="mma with 8 of 32 threads"):
        multiply("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", a, b, c, "s4", "s4", guard)


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    """Row i of matrix j lies where lane 8 j + i points; here the rows are in a random order."""
    rng = np.random.default_rng(count)
    rows, order = rng.integers(0, 2**16, (32, 8), dtype=np.uint16), rng.permutation(32)
    targets = ", ".join(f"%y{j}" for j in range(count))
    code = f"""
        shl.b32 %r0, %r15, 4;
        st.shared.v4.b32 [%r0], {{%a0, %a1, %a2, %a3}};
        bar.sync 0;
        shl.b32 %r1, %b0, 4;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 {{{targets}}}, [%r1];"""
    found = compute(code, rows.view(np.uint32), order.astype(np.uint32), results=count).reshape(32, count)
    for j in range(count):
        matrix = rows[order[8 * j : 8 * j + 8]]
        matrix = matrix.T if trans else matrix
        expected = [int(matrix[g, 2 * t]) | int(matrix[g, 2 * t + 1]) << 16 for g, t in LANES]
        np.testing.assert_array_equal(found[:, j], expected)
