"""Machine code as text: control bits, loops, and what of them runs."""

import textwrap

import pytest

from comfyui_nibble.quant_core.evaluation.bench.predict import sass
from comfyui_nibble.tests.quant_core.evaluation.bench.predict.handwritten import line

pytestmark = pytest.mark.quick


def test_control_bits():
    text = line("LDG.E.128", "R4, [R2.64]", guard="@!P0", stall=4, writes=2, reads=1, waits=(0, 5))
    (one,) = sass.parse(text).instructions
    assert one == sass.Instruction("LDG.E.128", "R4, [R2.64]", "@!P0", 4, 2, 1, (0, 5))
    assert not one.dead
    assert sass.parse(line("LDS", "RZ, [RZ]", guard="@!PT")).instructions[0].dead


def test_a_line_as_nvdisasm_prints_it():
    text = """
        .L_x_1:
            /*0070*/              @!P1 FFMA R6, R6.reuse, -12582912, RZ ;          /* 0x0000000000067423 */
                                                                                   /* 0x004fe400000000ff */
            /*0080*/                   BRA `(.L_x_1) ;                             /* 0xfffffff000007947 */
                                                                                   /* 0x000fea000383ffff */
    """
    code = sass.parse(textwrap.dedent(text))
    fma, back = code.instructions
    assert (fma.op, fma.guard, fma.stall, fma.waits, fma.writes) == ("FFMA", "@!P1", 2, (2,), sass.NO_BOARD)
    assert fma.args == "R6, R6.reuse, -12582912, RZ"
    assert (back.kind, back.stall, code.loops) == ("BRA", 5, ((0, 2),))


def test_the_loop_with_the_most_products_comes_first_and_loops_around_it_do_not_count():
    product, add = line("IMMA.16864.S4.S4", "R0, R4.ROW, R8.COL, RZ"), line("IADD3", "R0, R0, 0x1, RZ")
    text = "\n".join(
        (
            ".L_x_0:", add, add, add, line("BRA", "`(.L_x_0)"),
            ".L_x_1:", add, ".L_x_2:", product, product, line("BRA", "`(.L_x_2)"), line("BRA", "`(.L_x_1)"),
            ".L_x_3:", product, product, product, line("EXIT"), line("BRA", "`(.L_x_3)"),
            ".L_x_4:", add, line("EXIT", guard="@P0"), line("BRA", "`(.L_x_4)"),
        )
    )  # fmt: skip
    code = sass.parse(text)
    first, *others = sass.inner_loops(code)
    assert sass.products(code.instructions[slice(*first)]) == 2
    assert others == [(0, 4), (14, 17)]


def test_a_slow_path_that_calls_is_jumped_over_and_other_branches_are_not():
    add, mul = line("IADD3", "R0, R0, 0x1, RZ"), line("FMUL", "R0, R0, R0")
    text = "\n".join(
        (
            ".L_x_0:", line("BRA", "`(.L_x_1)", guard="@!P0"), mul, line("CALL.REL.NOINC", "`(slow)"),
            ".L_x_1:", add, line("BRA", "`(.L_x_2)", guard="@P1"), mul, ".L_x_2:", line("BRA", "`(.L_x_0)"),
        )
    )  # fmt: skip
    code = sass.parse(text)
    (span,) = sass.inner_loops(code)
    assert [i.kind for i in code.executed(span)] == ["BRA", "IADD3", "BRA", "FMUL", "BRA"]
