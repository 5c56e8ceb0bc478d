"""The model on loops so small that their cycles can be counted by hand."""

import pytest

from comfyui_nibble.quant_core.evaluation.bench.predict import multiprocessor as model
from comfyui_nibble.quant_core.evaluation.bench.predict import sass
from comfyui_nibble.quant_core.evaluation.bench.predict.prediction import Loop, resident
from comfyui_nibble.quant_core.evaluation.bench.predict.throughput import CARDS, card_named
from comfyui_nibble.tests.quant_core.evaluation.bench.predict.handwritten import line

pytestmark = pytest.mark.quick

ADA, AMPERE = card_named("RTX 4090"), card_named("A100")
FMA, PRODUCT = ("FFMA", "R0, R1, R2, R0"), ("IMMA.16864.S4.S4", "R0, R4.ROW, R8.COL, R0")


def body(*lines):
    return sass.parse("\n".join(lines)).instructions


def cycles(instructions, card=ADA, warps=4, blocks=1):
    return model.simulate(instructions, card, warps, blocks)


def test_a_warp_issues_when_its_stall_is_over():
    assert cycles(body(*[line(*FMA, stall=4)] * 10)) == 40
    assert cycles(body(*[line(*FMA, stall=1)] * 10)) == 10


def test_warps_of_a_scheduler_share_its_issue_and_lanes():
    assert cycles(body(*[line(*FMA, stall=4)] * 10), warps=16) == 40  # four warps hide the stalls
    assert cycles(body(*[line(*FMA, stall=4)] * 10), warps=32) == 80
    assert cycles(body(*[line(*FMA)] * 10), AMPERE) == 20  # 16 lanes of FP32 a sub-core


def test_tensor_cores_are_busy_as_long_as_the_public_figures_say():
    assert model.use_of(body(line(*PRODUCT))[0], ADA).busy == 16
    assert model.use_of(body(line(*PRODUCT))[0], AMPERE).busy == 8
    assert cycles(body(*[line(*PRODUCT, stall=2)] * 8)) == 128
    assert card_named("RTX 5090").peak(512) == pytest.approx(1676e12, rel=0.01)
    assert ADA.peak(ADA.int4) == pytest.approx(1321e12, rel=0.01)
    assert AMPERE.peak(AMPERE.int8) == pytest.approx(624e12, rel=0.01)
    assert card_named("H100").peak(1024) == pytest.approx(1979e12, rel=0.01)
    assert card_named("RTX 2080 Ti").peak(512) == pytest.approx(455e12, rel=0.01)


def test_a_scoreboard_is_waited_for():
    load = line("LDS.128", "R4, [R1]", writes=3)
    use = line(*FMA, waits=(3,))
    # The path is busy for 4 cycles, then the data takes SHARED; the FMA and its turn take one each.
    assert cycles(body(load, use), warps=1) == 4 + model.SHARED + 1
    # Four warps queue for one path: the loop is as long as that of the last in the queue.
    assert cycles(body(load, use), warps=4) <= 4 * 4 + model.SHARED + 1


def test_copies_are_waited_for_by_group():
    copy = line("LDGSTS.E.BYPASS.128", "[R1], [R2.64]")
    group, wait = line("LDGDEPBAR", "", writes=0), "DEPBAR.LE"
    one = cycles(body(copy, group, line(wait, "SB0, 0x0")), warps=1)
    two = cycles(body(copy, group, line(wait, "SB0, 0x1")), warps=1)
    assert one > model.MEMORY
    assert two == pytest.approx(one / 2, rel=0.02)  # two groups are on their way at a time


def test_a_barrier_holds_the_warps_of_a_block_together_and_no_others():
    bar = line("BAR.SYNC.DEFER_BLOCKING", "0x0")
    assert cycles(body(line(*FMA), bar), warps=4) == 1 + model.BARRIER
    never = line("BAR.SYNC.DEFER_BLOCKING", "0x0", guard="@!P2")
    assert cycles(body(line(*FMA), never), warps=4) == 2
    work = [line(*FMA)] * 40
    alone, both = cycles(body(*work, bar), warps=4), cycles(body(*work, bar), warps=4, blocks=2)
    assert both < 2 * alone  # one block works while the other waits


def test_bounds_and_what_limits():
    instructions = body(*[line(*PRODUCT)] * 2, *[line(*FMA)] * 6, line("LDSM.16.M88.4", "R0, [R1]"))
    found = model.modelled(instructions, ADA, 8, 1)
    assert found.bounds == {
        "tensor": 64, "issue": 18, "FMA": 12, "integer": 0, "special": 0, "load/store": 32
    }  # fmt: skip
    assert found.limit == "tensor"
    assert found.tensor == pytest.approx(64 / found.cycles)
    slow = model.modelled(body(line("BAR.SYNC.DEFER_BLOCKING", "0x0"), line(*FMA)), ADA, 4, 1)
    assert slow.limit == "barriers and latency"


def test_how_many_blocks_fit():
    assert resident(ADA, 128, 20_000, 8) == 2  # registers
    assert resident(ADA, 130, 20_000, 8) == 1  # in units of 8 a thread
    assert resident(ADA, 32, 48 * 1024, 4) == 2  # shared memory, with 1 KiB a block
    assert resident(ADA, 16, 0, 8) == 6  # 48 warps
    assert resident(ADA, 16, 0, 1) == 16
    assert resident(ADA, 255, 120_000, 16) == 1


def test_rounds_of_blocks():
    """Ten cycles a step and 20 instructions of each warp around the loop, one block at a time."""
    loop = Loop(body(*[line(*FMA)] * 10), 4, 1, 20, 64, 100)
    once = 10 * 5 + 20 + 4 * model.MEMORY
    assert loop.cycles(ADA, 1, 5) == loop.cycles(ADA, 128, 5) == once
    assert loop.cycles(ADA, 129, 5) == 2 * once


def test_cards():
    assert card_named(" rtx 4090") is CARDS["RTX 4090"]
    with pytest.raises(ValueError, match="RTX 9090: no such card is modelled, known are RTX 2080 Ti, A100"):
        card_named("RTX 9090")
