"""A group-64 layer as W8A8: little is lost in the weights, much gained in the activations."""

import pytest

from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.layer.precisions import in_int8
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.support import sqnr_db

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "parts", [(Part(0, 256),), (Part(0, 256, True),), (Part(0, 64), Part(64, 256, True))]
)
def test_weights_stay_and_outputs_get_better(make_problem, parts):
    problem = make_problem(96, 256, parts=parts, fit_tokens=2048)
    layer = METHODS["svdquant"].fit(problem, METHODS["svdquant"].configured(rank=16)).layer
    again = in_int8(layer)
    assert {
        (p.weight.bits, p.weight.granularity, p.activation.bits, p.activation.granularity)
        for p in again.spec.parts
    } == {(8, "channel", 8, "token")}
    assert again.spec.describe().startswith("W8A8 per channel smooth")
    assert again.tensors["weight"].shape == (96, 256)
    assert again.tensors["weight_scale"].shape == (len(parts), 96)
    # 8 bits of a row against 4 bits of a group: 30 dB and more between the two roundings.
    assert sqnr_db(layer.dequantize(), again.dequantize()) > 38
    x = problem.tokens("report")
    exact = x.double() @ problem.weight.double().T + problem.bias.double()
    assert sqnr_db(exact, again(x)) > sqnr_db(exact, layer(x)) + 1
