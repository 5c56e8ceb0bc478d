"""The method native with nvfp4 for its 4 bits: layers that ComfyUI's own format holds to the last bit."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.operator import nvfp4
from comfyui_nibble.kernels.operator.quantizers import dequantize
from comfyui_nibble.quant_core.formats.kitchen import native as exported
from comfyui_nibble.quant_core.formats.kitchen.nvfp4 import with_one_scale
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.methods import METHODS, fit_problem, tensor_nvfp4
from comfyui_nibble.tests.support import sqnr_db

METHOD = METHODS["native"]


def fit(problem, **options):
    return fit_problem(problem, METHOD, METHOD.configured(grid="nvfp4", **options))


def test_the_cheapest_that_is_good_enough(make_problem):
    """Under the outliers of these tokens nvfp4 reaches 11.9 dB, where int4 behind a rotation has 4.7."""
    problem = make_problem(192, 512)
    four = fit(problem, quality_db=0)
    assert four.layer.spec.describe() == "W4A4 nvfp4 one scale a tensor"
    assert four.choices == {"grid": "nvfp4", "rounding": "gptq"}
    db = output_sqnr(problem, four.layer, "select")
    int4 = fit_problem(make_problem(192, 512), METHOD, METHOD.configured(quality_db=0)).layer
    assert db > output_sqnr(problem, int4, "select") + 3
    assert fit(problem, quality_db=db - 0.1).layer.spec == four.layer.spec
    eight = fit(problem, quality_db=db + 0.1).layer
    assert eight.spec.describe() == "W8A8 per channel H256"
    for layer, name in ((four.layer, "nvfp4"), (eight, "int8_tensorwise")):
        assert exported.format_of(layer.spec, layer=lambda layer=layer: layer) == (name, "")
    assert torch.equal(with_one_scale(four.layer).dequantize(), four.layer.dequantize())


def test_each_step_earns_its_place(make_problem):
    problem = make_problem(192, 512)
    start = tensor_nvfp4.nearest(problem)
    values = dequantize(start.codes, start.scales, "group", 16)
    six = problem.weight.float().unflatten(-1, (-1, 16)).abs().amax(-1) / 12
    six = nvfp4.under(six, nvfp4.power_below(2 * six.amax()))
    plain = dequantize(nvfp4.quantize(problem.weight.float(), six), six, "group", 16)
    assert sqnr_db(problem.weight, values) > sqnr_db(problem.weight, plain) + 0.3
    nearest, by_gptq = (fit(make_problem(192, 512), quality_db=0, gptq=on) for on in (False, True))
    assert nearest.choices["rounding"] == "nearest"
    assert output_sqnr(problem, by_gptq.layer) > output_sqnr(problem, nearest.layer) + 0.3


def test_second_moments_are_left_as_they_were(make_problem):
    problem = make_problem(96, 256)
    before = {b: h.clone() for b, h in problem.statistics.hessians.items()}
    fit(problem, quality_db=0)
    assert all(torch.equal(before[b], h) for b, h in problem.statistics.hessians.items())


def test_without_calibration_the_weights_decide(make_problem):
    problem = make_problem(64, 256, calibrated=False)
    four = fit(problem, quality_db=10).layer
    weights = sqnr_db(problem.weight.float(), four.dequantize())
    assert four.spec.grid == "nvfp4"
    assert weights > 18
    assert fit(problem, quality_db=weights - 3 + 0.1).layer.spec.grid == "int"


@pytest.mark.quick
def test_rows_too_far_apart_for_one_scale_of_what_gptq_finds(make_problem):
    """At 2^-20 of the others a row has the smallest e4m3 number, and what GPTQ found for it none at all."""
    problem = make_problem(64, 256)
    problem.weight[3] *= 2.0**-20
    problem.weight[5] = 0
    problem.weight[7, :16] = 0
    layer = fit(problem, quality_db=0).layer
    assert exported.format_of(layer.spec, layer=lambda: layer) == ("nvfp4", "")
    assert not layer.dequantize()[5].any()
    assert not layer.dequantize()[7, :16].any()
    others = torch.arange(64) != 3
    assert sqnr_db(problem.weight[others], layer.dequantize()[others]) > 15


@pytest.mark.quick
def test_shapes_that_comfyui_does_not_have_in_nvfp4(make_problem):
    assert fit(make_problem(40, 256), quality_db=0).layer.spec.parts[0].weight.bits == 8
    problem = make_problem(64, 256)
    problem.layer = replace(problem.layer, name="input_blocks.4.1.transformer_blocks.0.attn2.to_k")
    assert fit(problem, quality_db=0).layer.spec.parts[0].weight.bits == 8
