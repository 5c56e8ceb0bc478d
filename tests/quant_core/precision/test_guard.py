"""What a layer can be raised to, on synthetic layers with outliers, and what the report says of it."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from comfyui_nibble.kernels.dispatch import choose
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.calibration.file import CalibrationError
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.precisions import higher, w4a8, w8a8
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.methods import METHODS, weight_only
from comfyui_nibble.quant_core.precision.budget import for_memory, for_quality
from comfyui_nibble.quant_core.precision.guard import as_units, by_layer, measure, raised
from comfyui_nibble.quant_core.precision.guard_report import Decision, guard_text, rows_after
from comfyui_nibble.quant_core.precision.measured import Measured, Option, from_json, option_of
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.quant_core.store.own_json import NotOurs
from comfyui_nibble.tests.support import sqnr_db

PLAIN, GELU, HALVES = (Part(0, 512),), (Part(0, 512, True),), (Part(0, 128), Part(128, 512, True))
ADA = Target("cuda", 89, (3, 6), "a card with INT4 tensor cores")


def quantized(problem, method="svdquant", **options):
    options = {"rank": 16} | options if method.startswith("svdquant") else {}
    return METHODS[method].fit(problem, METHODS[method].configured(**options)).layer


@pytest.mark.parametrize("parts", [PLAIN, GELU, HALVES])
@pytest.mark.parametrize("method", ["svdquant", "svdquant_r", "convrot"])
def test_each_precision_is_better_than_the_one_below(make_problem, parts, method):
    problem = make_problem(192, 512, parts)
    layer = quantized(problem, method)
    found = dict(raised(problem, layer))
    assert list(found) == higher(layer.spec) == ["W4A8", "W8A8", "16 bit"]
    db = [output_sqnr(problem, made) for made in (layer, found["W4A8"], found["W8A8"])]
    # 1.7 dB and more where the weights' noise is most of it, 6 dB at best; without smoothing a row's scale is
    # lost on outliers.
    assert db[1] > db[0] + 1.5
    assert db[2] > db[1] + 13
    if method != "convrot":
        assert db[2] > 40
    assert option_of(problem, found["W8A8"]).noise == 10 ** (-db[2] / 10)
    assert found["16 bit"] is None
    assert option_of(problem, None).noise == 0.0


@pytest.mark.parametrize("parts", [PLAIN, GELU, HALVES])
def test_bytes(make_problem, parts):
    problem = make_problem(192, 512, parts)
    layer = quantized(problem)
    made = dict(raised(problem, layer))
    found = {precision: option_of(problem, higher) for precision, higher in made.items()}
    assert found["W4A8"].nbytes == layer.nbytes
    # codes, an fp32 scale a row and part, smoothing and the bias in 16 bit
    assert found["W8A8"].nbytes == made["W8A8"].nbytes == 192 * 512 + 4 * 192 * len(parts) + 2 * 512 + 2 * 192
    assert found["16 bit"].nbytes == 2 * 192 * 512 + 2 * 192


def test_w4a8_shares_every_tensor(make_problem):
    layer = quantized(make_problem(96, 512, HALVES))
    again = w4a8(layer)
    assert {k: t.data_ptr() for k, t in again.tensors.items()} == {
        k: t.data_ptr() for k, t in layer.tensors.items()
    }
    for before, after in zip(layer.spec.parts, again.spec.parts, strict=True):
        assert (after.activation.bits, after.activation.unsigned, after.activation.clip) == (8, False, 1.0)
        assert replace(after, activation=before.activation) == before
        assert (after.activation.shift, after.activation.granularity) == (
            before.activation.shift,
            before.activation.granularity,
        )


def test_w8a8_keeps_transforms_and_gives_the_bias_back(make_problem):
    problem = make_problem(96, 512, HALVES)
    layer = quantized(problem, "svdquant_r", rotation=64)
    again = w8a8(problem, layer)
    assert [p.rotation for p in again.spec.parts] == [p.rotation for p in layer.spec.parts]
    assert torch.equal(again.tensors["smooth_factor"], layer.tensors["smooth_factor"])
    assert torch.equal(again.tensors["bias"], problem.bias)
    assert not torch.equal(
        layer.tensors["bias"].to(problem.bias.dtype), problem.bias
    )  # it holds the correction of the shift
    assert {p.activation.shift for p in again.spec.parts} == {0.0}
    assert again.spec.rank == 0
    assert sqnr_db(problem.weight.float(), again.dequantize()) > 40


def test_no_bias_stays_none(make_problem):
    problem = make_problem(96, 512, GELU, bias=False)
    layer = quantized(problem)
    assert layer.spec.bias  # made for the shift
    assert "bias" not in w8a8(problem, layer).tensors
    assert option_of(problem, None).nbytes == 2 * 96 * 512


@pytest.mark.parametrize("parts", [PLAIN, GELU, (Part(0, 128), Part(128, 640, True))])
def test_raised_layers_stay_on_tensor_cores(make_problem, parts):
    problem = make_problem(96, parts[-1].stop, parts)
    layer = quantized(problem)
    assert choose(layer.spec, ADA).path == "int4 tensor cores"
    assert (
        choose(w4a8(layer).spec, ADA).path
        == choose(w8a8(problem, layer).spec, ADA).path
        == "int8 tensor cores"
    )


def test_what_is_above(make_problem):
    problem = make_problem(96, 512)
    layer = quantized(problem)
    assert higher(w4a8(layer).spec) == ["W8A8", "16 bit"]
    assert higher(w8a8(problem, layer).spec) == ["16 bit"]
    assert higher(weight_only.fit(problem).layer.spec) == []
    assert [name for name, _ in raised(problem, layer, allowed=("16 bit", "W4A8"))] == ["W4A8", "16 bit"]


class OneInput:
    """A calibration of one layer."""

    path = "calibration"

    def __init__(self, statistics):
        self.statistics = statistics

    def width(self, name):
        return self.statistics.width

    def get(self, name, second_moments):
        assert not second_moments
        return self.statistics


def test_measured_numbers(make_problem):
    problem = make_problem(96, 512)
    layer, name = quantized(problem), problem.layer.name
    tensors = {f"{name}.weight": problem.weight, f"{name}.bias": problem.bias}
    (m,) = measure([problem.layer], {name: layer}, Tensors(tensors), OneInput(problem.statistics), ("W8A8",))
    here, above = option_of(problem, layer), option_of(problem, w8a8(problem, layer))
    assert m == Measured(name, "blocks.0", 512, 96, options={"W8A8": above}, now=("W4A4", here))
    assert (here.activation_bits, here.weight_bits, here.cost) == (4, 4, 96 * 512)
    assert (above.activation_bits, above.weight_bits, above.cost) == (8, 8, 2 * 96 * 512)
    assert from_json(json.loads(json.dumps(asdict(m)))) == m
    problem.statistics.tokens = problem.statistics.tokens[:1]
    with pytest.raises(
        CalibrationError, match=r"no held-out tokens of layer blocks.0.linear .* 2 samples or more"
    ):
        list(measure([problem.layer], {name: layer}, Tensors(tensors), OneInput(problem.statistics)))


# -- layers, blocks and the report, on numbers


def measured(name, now, w4a8_noise):
    """A layer of 1 KiB, 32 x 64, at noise `now`."""
    of = lambda nbytes, noise: Option(noise, nbytes, 4.0, 4.0, 2048.0)
    options = {"W4A8": of(1024, w4a8_noise), "W8A8": of(2048, 0.0001), "16 bit": of(4096, 0.0)}
    block = name.rpartition(".")[0]
    return Measured(name, block, 64, 32, options=options, now=("W4A4", of(1024, now)))


MEASURED = [measured("b.0.x", 0.02, 0.015), measured("b.0.y", 0.004, 0.005), measured("b.1.x", 0.006, 0.003)]
ALL = ("W4A8", "W8A8", "16 bit")


def decide(by, limit, blocks=False, measured=MEASURED, allowed=ALL):
    units = as_units(measured, blocks)
    chosen = (for_quality if by == "quality" else for_memory)(units, limit)
    return Decision(by, limit, blocks, allowed, measured, units, chosen, by_layer(measured, chosen, blocks))


def test_a_layer_of_a_block_that_would_measure_worse_stays():
    block = as_units(MEASURED, True)[0]
    assert (block.name, block.noise, block.layers) == ("b.0", 0.024, 2)
    assert [(o.precision, o.extra, round(o.noise, 6)) for o in block.upgrades] == [
        ("W4A8", 0, 0.019),
        ("W8A8", 2048, 0.0002),
        ("16 bit", 6144, 0.0),
    ]
    assert decide("memory", 0, blocks=True).layers == {"b.0.x": "W4A8", "b.1.x": "W4A8"}
    assert decide("quality", 20, blocks=True).layers == {"b.0.x": "W4A8"}  # mean noise 0.012 -> 0.0095
    assert decide("quality", 25, blocks=True).layers == {"b.0.x": "W8A8", "b.0.y": "W8A8", "b.1.x": "W4A8"}


def test_report_of_a_quality_budget():
    text = guard_text(decide("quality", 22), "FLUX.1, Nibble Guard", "Good: close.\nLook.")
    assert text.splitlines()[:6] == [
        "FLUX.1, Nibble Guard",
        "Good: close.",
        "Look.",
        "Asked for: every layer at 22 dB or more, at the least extra",
        "  memory",
        "Allowed: W4A8, W8A8, 16 bit",
    ]
    assert "1 of 3 measured layers raised: 1 to W8A8" in text
    assert "Their memory: 3.0 KiB -> 4.0 KiB, +1.0 KiB" in text
    # means of 0.02, 0.004, 0.006 and of 0.0001, 0.004, 0.006
    assert "Error on held-out tokens: mean 20.0 dB -> 24.7 dB,\n  worst layer 17.0 dB -> 22.2 dB" in text
    assert text.splitlines()[-2:] == [
        "b.0.x: W4A4 -> W8A8, 17.0 dB -> 40.0 dB, +1.0 KiB",
        "  worst of 3; below the target 22 dB (W4A8: 18.2 dB)",
    ]
    assert max(map(len, text.splitlines())) <= 64


def test_report_says_what_misses_the_target():
    text = guard_text(
        decide(
            "quality",
            22,
            allowed=("W4A8",),
            measured=[replace(m, options={"W4A8": m.options["W4A8"]}) for m in MEASURED],
        ),
        "",
    )
    assert "b.0.x: worst" not in text
    text = " ".join(text.split())  # without its line breaks
    assert "below the target 22 dB, the nearest that the allowed precisions come" in text
    assert "Below the target: b.0.x at 18.2 dB, the best of W4A8. Allow 16 bit to reach it." in text
    assert "W4A8 costs no memory, only that: 1 of them." in text


def test_report_of_a_memory_budget():
    decision = decide("memory", 1100)
    assert decision.layers == {"b.0.x": "W8A8", "b.1.x": "W4A8"}
    text = guard_text(decision, "")
    text = " ".join(text.split())  # without its line breaks
    assert "the least error at 1.1 KiB more or less" in text
    assert "3.0 KiB -> 4.0 KiB, +1.0 KiB of 1.1 KiB allowed" in text
    assert "worst of 3; takes away 66.3 % of all noise" in text  # 0.0199 of 0.03
    assert "no. 2 of 3 from the worst; takes away 10.0 % of all noise" in text
    assert (
        "Not raised further, 0.1 KiB of the budget are left: b.0.x at 40.0 dB (16 bit: +2.0 KiB, exact); "
        "b.1.x"
    ) in text


def test_nothing_to_raise():
    assert "No layer with quantized inputs" in guard_text(decide("quality", 20, measured=[]), "")
    text = guard_text(decide("quality", 10), "")
    assert "0 of 3 measured layers raised\n" in text
    assert "slower" not in text


def test_rows(make_problem):
    problem = make_problem(96, 512)
    raised = w8a8(problem, quantized(problem))
    rows = [
        Row(m.name, m.block, 512, 96, "W4A4 g64 r16", 1.0, 1024, choices={"smooth": "rms"}).to_json()
        for m in MEASURED
    ]
    rows.append(Row("b.0.mod", "b.0", 512, 96, "W4A16 g64", None, 99).to_json())
    decision = replace(decide("quality", 25), layers={"b.0.x": "16 bit", "b.1.x": "W8A8"})
    made = {"b.0.x": None, "b.1.x": QuantizedLayer("b.1.x", raised.spec, raised.tensors)}
    x, y, z, mod = rows_after(rows, decision, made)
    assert (x["what"], x["nbytes"], x["sqnr_db"]) == ("16 bit", 0, None)
    assert x["note"] == "raised by Nibble Guard, was W4A4 at 17.0 dB"
    assert y == rows[1] | {"sqnr_db": pytest.approx(23.979, abs=1e-3)}  # measured now, and left
    assert (z["what"], z["nbytes"], z["sqnr_db"]) == ("W8A8 per channel smooth", 2048, pytest.approx(40))
    assert z["choices"] == {"smooth": "rms", "guard": "raised by Nibble Guard, was W4A4 at 22.2 dB"}
    assert mod == rows[3]


@pytest.mark.parametrize(
    "change",
    [
        {"in_features": 1.5},
        {"options": {"W8A8": [1]}},
        {"options": {"W8A8": {"noise": float("nan")}}},
        {"options": {"W8A8": {"noise": "0.1"}}},
        {"options": [1]},
        {"now": ["W4A4"]},
        {"now": ["W4A4", 0.1]},
        {"name": None},
    ],
)
def test_a_damaged_row_of_kept_numbers_is_none(change):
    row = json.loads(json.dumps(asdict(MEASURED[0])))
    assert from_json(row) == MEASURED[0]
    with pytest.raises(NotOurs):
        from_json(row | change)
