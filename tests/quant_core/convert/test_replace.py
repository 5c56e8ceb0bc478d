"""Layers in 8 or 16 bit in place of what a format cannot hold."""

import pytest
import torch

from comfyui_nibble.quant_core.convert import replace
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.formats.kitchen import native
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen_out
from comfyui_nibble.quant_core.layer.problem import output_sqnr
from comfyui_nibble.quant_core.methods import METHODS, weight_only
from comfyui_nibble.tests.support import relative_error, sqnr_db

pytestmark = pytest.mark.quick


@pytest.fixture
def shifted(make_problem):
    """FLUX's linear2: two parts, the second shifted and unsigned, with the correction of the shift in its
    bias."""
    problem = make_problem(96, 640, (Part(0, 128), Part(128, 640, after_gelu=True)))
    layer = METHODS["svdquant"].fit(problem, METHODS["svdquant"].configured(rank=16, gptq=False)).layer
    assert layer.spec.parts[1].activation.shift
    return problem, layer


def test_dense_takes_the_shift_out_of_the_bias(shifted):
    problem, layer = shifted
    weight, bias = replace.dense(layer)
    assert relative_error(layer.tensors["bias"].float(), bias) > 0.1
    assert relative_error(problem.bias.float(), bias) < 1e-6
    assert sqnr_db(problem.weight.float(), weight) > 15


@pytest.mark.parametrize("what", replace.AS)
def test_both_stay_as_good_as_the_layer_was(shifted, what):
    """At 16 bit better, as x is no longer at 4 bits; at 8 bits about the same under these outliers, without
    smoothing and groups."""
    problem, layer = shifted
    layers, rest = replace.replaced({"a": layer, "b": layer}, {"c": torch.ones(1)}, ["a"], what)
    assert layers["b"] is layer
    before = output_sqnr(problem, layer)
    if what == "int8":
        assert native.format_of(layers["a"].spec) == ("int8_tensorwise", "")
        assert set(rest) == {"c"}
        assert output_sqnr(problem, layers["a"]) > before - 0.5
        assert sqnr_db(layer.dequantize(), layers["a"].dequantize()) > 38
        return
    assert set(layers) == {"b"}
    assert {k: t.dtype for k, t in rest.items()} == {
        "a.weight": torch.bfloat16,
        "a.bias": torch.bfloat16,
        "c": torch.float32,
    }
    x = problem.tokens("report")
    want = x @ problem.weight.float().T + problem.bias.float()
    assert sqnr_db(want, x @ rest["a.weight"].float().T + rest["a.bias"].float()) > before


def test_float16_stays_float16_and_no_bias_stays_none(make_problem):
    layer = (
        METHODS["svdquant"]
        .fit(
            make_problem(64, 128, calibrated=False, bias=False, dtype=torch.float16),
            METHODS["svdquant"].config,
        )
        .layer
    )
    _, rest = replace.replaced({"a": layer}, {}, ["a"], "16 bit")
    assert {k: t.dtype for k, t in rest.items()} == {"a.weight": torch.float16}


def test_a_weight_only_layer_stays_one(make_problem):
    """FLUX's modulation at 8 bits a row, x in 16 bit: ComfyUI's full_precision_matrix_mult."""
    problem = make_problem(96, 128, calibrated=False)
    layer = weight_only.fit(problem).layer
    made = replace.int8(layer)
    assert made.spec.weight_only
    assert kitchen_out.format_of(made.spec)[0]["full_precision_matrix_mult"] is True
    x = torch.randn(4, 128)
    assert sqnr_db(layer(x), made(x)) > 38


def test_unknown_replacement(shifted):
    with pytest.raises(ValueError, match="unknown replacement 'fp8'; choose of int8, 16 bit"):
        replace.replaced({"a": shifted[1]}, {}, ["a"], "fp8")
