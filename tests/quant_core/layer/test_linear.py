import pytest
import torch

from comfyui_nibble.kernels.operator.spec import SpecError
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer, QuantLinear
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.support import relative_error

pytestmark = pytest.mark.quick


@pytest.fixture
def layer(make_problem):
    problem = make_problem(192, 320, parts=(Part(0, 64), Part(64, 320, after_gelu=True)), fit_tokens=1024)
    method = METHODS["svdquant"]
    return method.fit(problem, method.configured(rank=16)).layer


def test_split_rows_gives_the_same_outputs(layer):
    x = torch.randn(9, 320)
    pieces = layer.split_rows(["q", "k", "v"], [64, 96, 32])
    assert [p.spec.out_features for p in pieces] == [64, 96, 32]
    assert relative_error(layer(x), torch.cat([p(x) for p in pieces], 1)) < 1e-6
    assert pieces[0].tensors["proj_down"] is layer.tensors["proj_down"]


def test_module_equals_record(layer):
    x = torch.randn(2, 5, 320)
    module = QuantLinear(layer)
    assert torch.equal(module(x), layer(x))
    assert set(module.state_dict()) == set(layer.tensors)


def test_dequantized_weight_explains_the_output(layer):
    """With 8 more bits of activation there is only the weight's own error: y = x W_hat^T + the unshifted
    bias."""
    x = torch.randn(64, 320)
    x[:, 64:] = torch.nn.functional.gelu(x[:, 64:])
    shift = layer.spec.parts[1].activation.shift
    low_rank = layer.tensors["proj_up"][:, 16:].float() @ layer.tensors["proj_down"][64:].float().T
    correction = (layer.dequantize()[:, 64:] - low_rank).sum(1) * shift
    want = x @ layer.dequantize().T + layer.tensors["bias"].float() + correction
    assert relative_error(want, layer(x)) < 0.12


def test_counts_every_byte(layer):
    assert layer.nbytes == sum(t.numel() * t.element_size() for t in layer.tensors.values())
    assert layer.bits_per_weight == 8 * layer.nbytes / (192 * 320)


def test_tensors_that_do_not_fit_are_named(layer):
    with pytest.raises(
        SpecError, match=r"layer x: weight should have the shape \(192, 160\), found \(192, 150\)"
    ):
        QuantizedLayer("x", layer.spec, layer.tensors | {"weight": layer.tensors["weight"][:, :150]})
    with pytest.raises(SpecError, match="weight_scale has the dtype torch.int8"):
        QuantizedLayer(
            "x", layer.spec, layer.tensors | {"weight_scale": layer.tensors["weight_scale"].to(torch.int8)}
        )
    with pytest.raises(SpecError, match="asks for the tensors"):
        QuantizedLayer("x", layer.spec, {k: t for k, t in layer.tensors.items() if k != "proj_up"})
