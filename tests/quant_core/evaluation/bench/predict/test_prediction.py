"""Predictions of layers, with a compiler that hands out small loops written by hand, and the command."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.bench.predict import machine_code, prediction
from comfyui_nibble.quant_core.evaluation.bench.predict.multiprocessor import MEMORY
from comfyui_nibble.quant_core.evaluation.bench.predict.throughput import CARDS, card_named
from comfyui_nibble.tests.quant_core.evaluation.bench.predict.handwritten import line

ADA, HOPPER = card_named("RTX 4090"), card_named("H100")


def binary(*lines, registers=128, shared=40_000):
    text = "\n".join((".L_x_0:", *lines, line("BRA", "`(.L_x_0)"), line("EXIT")))
    return machine_code.Binary(registers, 0, shared, text)


def by_hand(job):
    """128 products a warp and round, with nothing else but the branch; of 8 warps, 128 x 128 x 512 codes. A
    quantizer that issues 100 instructions a step."""
    if job.kernel.startswith("quantize"):
        return binary(*[line("FFMA", "R0, R1, R2, R0")] * 99)
    eight = "IMMA.16832.S8.S8" if job.kernel.endswith("int8") else "IMMA.16864.S4.S4"
    if job.kernel == "gemm_fp4_kernel":
        eight = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"
    return binary(*[line(eight, "R0, R4.ROW, R8.COL, R0")] * 128)


@pytest.mark.quick
def test_a_layer_by_hand():
    layer = prediction.predict(replace(ADA, l2=1e15), "group", 3072, 3072, m=4096, compiler=by_hand)
    # 32 x 24 blocks on 128 multiprocessors, one each: 6 rounds of 6 steps, 128 products of 16 cycles, two
    # warps a scheduler. One instruction is outside of the loop.
    step = 2 * 128 * 16
    # Six iterations are measured, of which the two warps end the last at different times: 3 per cent.
    assert layer.product == pytest.approx(6 * (6 * step + 2 + 4 * MEMORY) / 2.52e9, rel=0.03)
    assert (layer.limit, layer.runs_as, layer.loop) == ("tensor", "W4A4", pytest.approx(1, rel=0.03))
    assert layer.half == pytest.approx(2 * 4096 * 3072**2 / 165.2e12 / 0.9)
    # 256 blocks of 16 tokens, two on each multiprocessor, 24 steps of 100 instructions of 4 warps.
    assert layer.quantizer == pytest.approx((24 * 200 + 2 + 4 * MEMORY) / 2.52e9, rel=1e-2)
    moved = 4096 * (3072 * 2.5 + 4 * 48 + 2 * 32)
    assert layer.bound == pytest.approx(moved / 1008e9)
    assert layer.ratio == pytest.approx(layer.half / (layer.product + layer.bound))  # memory holds it
    # A block reads its rows and columns in 4 bits and 64 channels' scales of 4 and 2 bytes.
    held = prediction.predict(ADA, "group", 3072, 3072, m=4096, compiler=by_hand)
    assert held.limit == "L2"
    assert held.product == pytest.approx(32 * 24 * 3072 * (128 + (4 + 2) * 128 / 64) / 5e12)


@pytest.mark.quick
def test_what_another_card_runs_and_what_holds_it_back():
    layer = prediction.predict(HOPPER, "group", 3072, 3072, compiler=by_hand)
    assert (layer.runs_as, layer.limit) == ("W8A8", "L2")


@pytest.mark.quick
def test_the_nvfp4_grid_by_hand():
    card = card_named("RTX 5090")
    layer = prediction.predict(replace(card, l2=1e15), "nvfp4", 3072, 3072, m=4096, compiler=by_hand)
    assert (layer.runs_as, layer.limit) == ("W4A4", "tensor")
    # As on Ada, 16 cycles a product; 768 blocks on 170 multiprocessors: 5 rounds of 6 steps.
    assert layer.product == pytest.approx(5 * (6 * 2 * 128 * 16 + 2 + 4 * MEMORY) / 2.407e9, rel=0.03)
    moved = 4096 * (3072 * (2.5 + 1 / 16) + 4 + 2 * 32)
    assert layer.bound == pytest.approx(moved / 1792e9)


@pytest.mark.quick
def test_the_table_says_what_it_is():
    layers = [prediction.predict(ADA, "group", 3072, 3072, compiler=by_hand)]
    first, second, head, row = prediction.text(ADA, layers).splitlines()
    assert first == (
        "Prediction for RTX 4090 (sm_89) from machine code and public throughputs: nothing was measured."
    )
    assert "165 TFLOP/s at 90%" in second
    assert head.split()[-1] == "limit"
    assert row.split()[:5] == ["group", "W4A4", "3072", "x", "3072"]


@pytest.mark.quick
def test_the_command(monkeypatch):
    monkeypatch.setattr(prediction, "compiled", by_hand)
    monkeypatch.setattr(prediction, "remembering", lambda: by_hand)
    result = CliRunner().invoke(app, ["bench", "--predict", "rtx 4090"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("Prediction for RTX 4090")
    assert len(lines) == 3 + 2 * len(prediction.SIZES)
    result = CliRunner().invoke(app, ["bench", "--predict", "rtx 5090"])
    assert len(result.output.splitlines()) == 3 + len(prediction.GRAINS) * len(prediction.SIZES)
    assert CliRunner().invoke(app, ["bench"]).exit_code == 2
    unknown = CliRunner().invoke(app, ["bench", "--predict", "RTX 9090"])
    assert isinstance(unknown.exception, ValueError)
    assert all(name in str(unknown.exception) for name in CARDS)


def test_kernels_that_differ_in_sizes_alone_are_compiled_once():
    jobs = []
    compiler = prediction.remembering(lambda job: jobs.append(job) or by_hand(job))
    for n, k in prediction.SIZES:
        prediction.predict(ADA, "channel", n, k, compiler=compiler)
    assert sorted(job.kernel for job in jobs) == ["ampere_s4s4", "quantize_kernel"]
