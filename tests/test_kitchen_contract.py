"""Our tensors, read by comfy-kitchen's eager ops, give our outputs: the numeric contract with ComfyUI."""

import pytest
import torch
from comfy_kitchen.backends.eager import convrot_w4a4, svdquant

from comfyui_nibble.kernels.dispatch import quant_linear
from comfyui_nibble.kernels.operator.packing import pack
from comfyui_nibble.kernels.operator.quantizers import quantize_activation
from comfyui_nibble.kernels.quant_activation import launch
from comfyui_nibble.kernels.target import interpreter
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.codes import layer_error
from comfyui_nibble.tests.support import relative_error

pytestmark = pytest.mark.quick


def kitchen_forward(x, layer):
    part, t = (
        layer.spec.parts[0],
        {k: v.float() if v.is_floating_point() else v for k, v in layer.tensors.items()},
    )
    unsigned = part.activation.unsigned
    shifted = x + part.activation.shift
    q, scales, low = svdquant.quantize_svdquant_w4a4(
        shifted, t["smooth_factor"], t["proj_down"], pad_size=1, act_unsigned=unsigned, lora_x=x
    )
    y = svdquant.scaled_mm_svdquant_w4a4(
        q, t["weight"], scales, t["weight_scale"], low, t["proj_up"], t["bias"], act_unsigned=unsigned
    )
    return q, scales, y


@pytest.mark.parametrize("after_gelu", [False, True])
def test_svdquant_through_comfy_kitchen(make_problem, after_gelu):
    problem = make_problem(96, 256, parts=(Part(0, 256, after_gelu),), fit_tokens=2048)
    method = METHODS["svdquant"]
    layer = method.fit(problem, method.configured(rank=16)).layer
    part = layer.spec.parts[0]
    assert part.activation.unsigned == after_gelu
    x = problem.tokens("report")
    q, scales, y = kitchen_forward(x, layer)
    codes, ours = quantize_activation(x, part, layer.tensors["smooth_factor"].float())
    assert torch.equal(pack(codes, 4), q)
    assert torch.equal(ours.T, scales)
    assert relative_error(y, layer(x)) < 1e-6


def test_weight_codes_and_scales_are_kitchens(make_problem):
    problem = make_problem(64, 256, calibrated=False, dtype=torch.float32)
    layer = METHODS["convrot"].fit(problem, METHODS["convrot"].config).layer
    packed, scales = convrot_w4a4.quantize_convrot_w4a4_weight(problem.weight, 256)
    assert torch.equal(layer.tensors["weight"], packed)
    assert torch.equal(layer.tensors["weight_scale"][0], scales)


@pytest.mark.parametrize(("k", "size"), [(256, 256), (192, 64)])
def test_convrot_through_comfy_kitchen(make_problem, k, size):
    problem = make_problem(64, k, calibrated=False)
    layer = METHODS["convrot"].fit(problem, METHODS["convrot"].config).layer
    assert layer.spec.parts[0].rotation == size
    x = torch.randn(17, k, generator=torch.Generator().manual_seed(3))
    t = layer.tensors
    y = convrot_w4a4.convrot_w4a4_linear(
        x, t["weight"], t["weight_scale"][0], t["bias"].float(), convrot_groupsize=size
    )
    assert layer_error(y, layer(x), x, layer.spec, t) < 1e-5


@pytest.mark.parametrize("after_gelu", [False, True])
def test_triton_kernels_through_comfy_kitchen(make_problem, after_gelu):
    """The quantizer's packed codes and scales are comfy-kitchen's, bit for bit; the product is its product in
    16 bit."""
    problem = make_problem(96, 256, parts=(Part(0, 256, after_gelu),), fit_tokens=2048)
    layer = METHODS["svdquant"].fit(problem, METHODS["svdquant"].configured(rank=16)).layer
    act, tensors = layer.spec.parts[0].activation, layer.tensors
    x = problem.tokens("report")[:70].half()
    q, scales, y = kitchen_forward(x.float(), layer)
    codes, scale = torch.empty(70, 128, dtype=torch.int8), torch.empty(4, 70)
    shared = (
        tensors["smooth_factor"],
        None,
        None,
        None,
        256,
        1,
        0,
        4,
        act.unsigned,
        True,
        0,
        act.shift,
        1.0,
        0,
        0.0,
    )
    launch.quantize_activation(x, codes, scale, None, *shared)
    assert torch.equal(codes, q)
    assert torch.equal(scale, scales)
    assert relative_error(y, quant_linear(x, layer.spec, tensors, target=interpreter())) < 1e-3
