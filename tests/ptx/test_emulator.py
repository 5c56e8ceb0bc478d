"""The machine: memory and its checks, control flow, registers, and how a kernel is launched."""

import numpy as np
import pytest

from comfyui_nibble.tests.ptx.emulator import run
from comfyui_nibble.tests.ptx.errors import DivergentBranch, EmulationError, MemoryFault, UndefinedRegister
from comfyui_nibble.tests.ptx.handwritten import SHARED_BYTES, compute, kernel
from comfyui_nibble.tests.ptx.memory import POISON

LANES = np.arange(32, dtype=np.uint32)
POISON_WORD = POISON * 0x0101_0101


def access(offset: str, size: int = 64, code: str = "ld.global.b32 %r1, [%d1];"):
    """Runs `code` with %d1 = the address of a buffer of `size` bytes + `offset`."""
    body = f"ld.param.u64 %d0, [buffer_a]; add.s64 %d1, %d0, {offset}; mov.b32 %r1, 0; {code}"
    params = [("u64", "buffer_a"), ("u64", "buffer_b")]
    return run(kernel(body, params), (1,), [np.zeros(size, np.uint8), np.zeros(size, np.uint8)], SHARED_BYTES)


def test_global_access_within_the_buffer():
    access("60")
    access("0", code="st.global.v4.b32 [%d1+48], {%r1, %r1, %r1, %r1};")


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        ("64", "nearest is buffer_a .64 bytes at 0x7f2000000000.*reaches 4 bytes past its end"),
        ("-4", "nearest is buffer_a .*begins 4 bytes before it"),
        ("1048000", "nearest is buffer_b .*before it"),
    ],
)
def test_global_access_outside_names_address_and_buffer(offset, message):
    with pytest.raises(
        MemoryFault, match=f"global load of 4 bytes at 0x.* outside any buffer; the {message}"
    ):
        access(offset)
    with pytest.raises(MemoryFault, match="global store"):
        access(offset, code="st.global.b32 [%d1], %r1;")


def test_a_vector_that_sticks_out():
    with pytest.raises(MemoryFault, match="global load of 16 bytes"):
        access("48", size=60, code="ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];")


def test_misaligned_access():
    with pytest.raises(MemoryFault, match="not aligned to 4 bytes"):
        access("2")


def test_only_active_threads_access_memory():
    access("64", code="setp.gt.u32 %p0, %r1, 0; @%p0 ld.global.b32 %r1, [%d1];")


def test_a_fault_says_where():
    with pytest.raises(MemoryFault) as caught:
        access("64")
    assert any("ld.global.b32 %r1, [%d1]" in note for note in caught.value.__notes__)
    assert "in CTA (0, 0, 0) of test" in caught.value.__notes__


def test_read_only_arrays():
    array = np.zeros(4, np.uint32)
    array.flags.writeable = False
    with pytest.raises(MemoryFault, match="read-only"):
        run(kernel("ld.param.u64 %d0, [a]; st.global.b32 [%d0], 1;", [("u64", "a")]), (1,), [array], 0)


def test_loads_extend_and_stores_truncate():
    a = np.arange(-16, 16, dtype=np.int8)
    code = "ld.param.u64 %d0, [p0]; cvt.u64.u32 %d1, %r15; add.s64 %d0, %d0, %d1; ld.global.{} %y0, [%d0];"
    assert (compute(code.format("s8"), a, dtype=np.int32) == a).all()
    assert (compute(code.format("b8"), a, dtype=np.int32) == a.view(np.uint8)).all()
    narrow = (
        "shl.b32 %r0, %r15, 1; st.shared.v2.b8 [%r0], {%a0, %a0}; ld.shared.b16 %h0, [%r0]; cvt.u32.u16 "
        "%y0, %h0;"
    )
    found = compute(narrow, LANES + 256)
    assert (found == LANES * 0x101).all()


def test_shared_memory_is_poisoned_and_bounded():
    assert (compute("mov.b32 %r0, buffer; ld.shared.b32 %y0, [%r0+128];", LANES) == POISON_WORD).all()
    compute(f"ld.shared.b32 %y0, [buffer+{SHARED_BYTES - 4}];", LANES)
    for code in (
        f"ld.shared.b32 %y0, [buffer+{SHARED_BYTES}];",
        "st.shared.b32 [%r15+-4], %a0; mov.b32 %y0, 0;",
    ):
        with pytest.raises(MemoryFault, match="shared|aligned"):
            compute(code, LANES)


COPY = """
    ld.param.u64 %d0, [p0];
    mad.wide.u32 %d1, %r15, 16, %d0;
    shl.b32 %r0, %r15, 4;
    cp.async.cg.shared.global [ %r0 + 0 ], [ %d1 + 0 ], 0x10, %b0;
    cp.async.commit_group;
"""


def test_cp_async_fills_with_zeros():
    """The first threads read nothing, the next ones half, the rest all 16 bytes."""
    a = np.random.default_rng(0).integers(1, 2**32, (32, 4), dtype=np.uint32)
    amount = np.repeat(np.array([0, 8, 16, 16], np.uint32), 8)
    found = compute(
        COPY + "cp.async.wait_group 0; ld.shared.v4.b32 {%y0, %y1, %y2, %y3}, [%r0];", a, amount, results=4
    )
    np.testing.assert_array_equal(found, np.where(np.arange(4) * 4 < amount[:, None], a, 0))


def test_cp_async_that_reads_nothing_may_point_anywhere():
    a, amount = np.ones((32, 4), np.uint32), np.zeros(32, np.uint32)
    code = (
        COPY.replace("mad.wide.u32 %d1, %r15, 16, %d0", "mov.b64 %d1, 0")
        + "cp.async.wait_all; ld.shared.b32 %y0, [%r0];"
    )
    assert (compute(code, a, amount) == 0).all()


def test_cp_async_lands_when_it_is_waited_for():
    a, amount = np.ones((32, 4), np.uint32), np.full(32, 16, np.uint32)
    early = (
        "cp.async.wait_group 1; ld.shared.b32 %y0, [%r0]; cp.async.wait_group 0; ld.shared.b32 %y1, [%r0];"
    )
    assert (compute(COPY + early, a, amount, results=2) == [POISON_WORD, 1]).all()


def test_a_uniform_loop_and_the_counts():
    body = """
        ld.param.u64 %d0, [out]; ld.param.u32 %r1, [n]; mov.b32 %r2, 0; mov.b32 %r3, 0;
    $L__BB0_1:
        add.s32 %r3, %r3, %r2;
        add.s32 %r2, %r2, 1;
        setp.lt.s32 %p1, %r2, %r1;
        @%p1 bra $L__BB0_1;
        st.global.b32 [%d0], %r3;"""
    out = np.zeros(1, np.int32)
    counts = run(kernel(body, [("u64", "out"), ("u32", "n")]), (1,), [out, 10], 0)
    assert out[0] == 45
    assert counts["bra"] == 10
    assert counts["add.s32"] == 20


def test_divergent_branch():
    with pytest.raises(DivergentBranch, match="taken by 5 of 32 threads"):
        compute("setp.lt.u32 %p0, %r15, 5; @%p0 bra END; END: mov.b32 %y0, 0;", LANES)


def test_predication_keeps_what_the_others_had():
    found = compute(
        "setp.lt.u32 %p0, %a0, 8; mov.b32 %y0, 7; @%p0 mov.b32 %y0, %a0; @!%p0 mov.b32 %y1, 1; @%p0 "
        "mov.b32 %y1, 2;",
        LANES,
        results=2,
    )
    np.testing.assert_array_equal(found[:, 0], np.where(LANES < 8, LANES, 7))
    np.testing.assert_array_equal(found[:, 1], np.where(LANES < 8, 2, 1))


def test_threads_that_never_wrote_a_register_find_poison():
    found = compute("setp.lt.u32 %p0, %a0, 8; @%p0 mov.b32 %y0, 1;", LANES)
    np.testing.assert_array_equal(found, np.where(LANES < 8, 1, POISON_WORD))


def test_undefined_register():
    with pytest.raises(UndefinedRegister, match="%r7 is read before any write"):
        compute("add.s32 %y0, %a0, %r7;", LANES)
    with pytest.raises(EmulationError, match="%q1 is not declared"):
        compute("add.s32 %y0, %a0, %q1;", LANES)


def test_bytes_that_nothing_uses_may_be_undefined():
    """LLVM puts words together with prmt from registers that it never wrote."""
    assert (
        compute("prmt.b32 %y0, %a0, %r7, 0x4100U; and.b32 %y0, %y0, 0xFFFF;", LANES) == LANES * 0x101
    ).all()


@pytest.mark.parametrize(
    "code",
    [
        "frobnicate.b32 %y0, %a0;",
        "add.sat.s32 %y0, %a0, %a0;",
        "add.rz.f32 %y0, %a0, %a0;",
        "ld.local.b32 %y0, [0];",
    ],
)
def test_unknown_instructions_are_named(code):
    with pytest.raises(NotImplementedError, match=code.split()[0]):
        compute(code, LANES)


def test_a_barrier_needs_all_threads():
    with pytest.raises(EmulationError, match="bar with 5 of 32 threads"):
        compute("setp.lt.u32 %p0, %r15, 5; @%p0 bar.sync 0; mov.b32 %y0, 0;", LANES)


def test_inline_assembly_has_registers_of_its_own():
    block = """
        // begin inline asm
        { .reg .b32 t; shl.b32 t, %%a0, %d; and.b32 %%y%d, t, 0xF0F0; }
        // end inline asm
        """
    outer = ".reg .b32 t; mov.b32 t, 99;" + block % (4, 0) + block % (8, 1) + "mov.b32 %y2, t;"
    found = compute(outer, LANES * 77, results=3)
    np.testing.assert_array_equal(
        found, np.stack([LANES * 77 << 4 & 0xF0F0, LANES * 77 << 8 & 0xF0F0, LANES * 0 + 99], 1)
    )
    with pytest.raises(NotImplementedError, match="reading Symbol.name='t'"):
        compute("{ .reg .b32 t; mov.b32 t, 1; } mov.b32 %y0, t;", LANES)


def test_grid_and_parameters():
    """Every CTA adds its place, once with a float and a negative integer; the pointer that Triton appends is
    null."""
    body = """
        ld.param.u64 %d0, [out]; ld.param.b32 %r0, [scale]; ld.param.b32 %r1, [shift]; ld.param.u64 %d2, [scratch];
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x; mad.lo.s32 %r5, %r3, %r4, %r2;
        mad.wide.u32 %d1, %r5, 4, %d0;
        add.s32 %r6, %r5, %r1; cvt.rn.f32.s32 %r6, %r6; mul.f32 %r6, %r6, %r0;
        cvt.u32.u64 %r7, %d2; setp.eq.b32 %p0, %r7, 0;
        @%p0 st.global.b32 [%d1], %r6;"""
    params = [("u64 .ptr .global .align 16", "out"), ("f32", "scale"), ("u32", "shift"), ("u64", "scratch")]
    out = np.zeros(6, np.float32)
    run(kernel(body, params), (3, 2), [out, 0.5, -3], 0)
    assert out.tolist() == [(i - 3) / 2 for i in range(6)]
    with pytest.raises(EmulationError, match="shift: no argument"):
        run(kernel(body, params), (1,), [out, 0.5], 0)
    with pytest.raises(EmulationError, match="5 arguments for the 4 parameters"):
        run(kernel(body, params), (1,), [out, 0.5, 1, 0, 0], 0)
