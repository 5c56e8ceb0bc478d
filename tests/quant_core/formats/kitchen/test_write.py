"""Our layers in comfy-kitchen's svdquant_w4a4; its eager forward is the judge."""

from dataclasses import replace

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreSVDQuantW4A4Layout
from safetensors.torch import load_file

from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen_out
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.methods.rtn import RTNConfig
from comfyui_nibble.tests.codes import layer_error

pytestmark = pytest.mark.quick

METHOD = METHODS["svdquant"]


def svdquant(problem, **options):
    return METHOD.fit(problem, METHOD.configured(rank=16, gptq=False, **options)).layer


def forward(path, name, x, unsigned):
    t = {
        k.removeprefix(f"{name}."): v.float() if v.is_floating_point() else v
        for k, v in load_file(path).items()
        if k.startswith(name)
    }
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=t["weight_scale"], orig_dtype=torch.float32, orig_shape=(96, 256), proj_down=t["weight_proj_down"], proj_up=t["weight_proj_up"],
        smooth_factor=t["weight_smooth_factor"], act_unsigned=unsigned,
    )  # fmt: skip
    return torch.nn.functional.linear(
        x, QuantizedTensor(t["weight"], "TensorCoreSVDQuantW4A4Layout", params), t["bias"]
    )


@pytest.mark.parametrize("after_gelu", [False, True])
def test_svdquant_runs_in_comfy_kitchen(make_problem, tmp_path, after_gelu):
    problem = make_problem(96, 256, (Part(0, 256, after_gelu),))
    layer = svdquant(problem)
    assert kitchen_out.losses({layer.name: layer.spec}) == {}
    kitchen_out.save(tmp_path / "a", {layer.name: layer}, {}, {})
    x = problem.tokens("report")
    assert (
        layer_error(
            forward(tmp_path / "a", layer.name, x, after_gelu), layer(x), x, layer.spec, layer.tensors
        )
        < 1e-5
    )


def test_without_smoothing_and_low_rank_it_gets_neutral_ones(make_problem, tmp_path):
    problem = make_problem(96, 256)
    layer = METHODS["rtn"].fit(problem, RTNConfig("group", "group")).layer
    assert set(layer.tensors) == {"weight", "weight_scale", "bias"}
    kitchen_out.save(tmp_path / "a", {layer.name: layer}, {}, {})
    x = problem.tokens("report")
    assert (
        layer_error(forward(tmp_path / "a", layer.name, x, False), layer(x), x, layer.spec, layer.tensors)
        < 1e-5
    )


def test_what_it_cannot_hold(make_problem, tmp_path):
    two = svdquant(make_problem(64, 320, (Part(0, 64), Part(64, 320, after_gelu=True)), fit_tokens=512))
    one = LinearSpec(256, 64, (PartSpec(0, 256, smooth=True, rank=16),))
    part = lambda **fields: replace(one, parts=(replace(one.parts[0], **fields),))
    specs = {
        "two": two.spec,
        "rotated": part(rotation=256),
        "weight-only": part(activation=None),
        "W4A8": part(activation=ActivationSpec(8)),
        "rows": part(weight=WeightSpec(4, "channel")),
        "good": one,
    }
    assert kitchen_out.losses(specs) == {
        "two": "has 2 ranges of in-channels with quantizers of their own; comfy-kitchen's layers have one",
        "rotated": "has a rotation of 256 channels; svdquant_w4a4 has none",
        "weight-only": "has 4-bit weights in groups for 16-bit activations; comfy-kitchen's awq_w4a16 has other codes",
        "W4A8": "has 8-bit signed activations per group; svdquant_w4a4 has 4-bit ones in groups of 64, signed "
        "or shifted by 0.171875 and unsigned",
        "rows": "has a low rank or smoothing with weights of 4 bits per channel; svdquant_w4a4 has groups of "
        "64 at 4 bits",
    }
    with pytest.raises(ValueError, match=r"layer two: it has 2 ranges .*Write it in 8 or 16 bit"):
        kitchen_out.save(tmp_path / "a", {"two": two}, {}, {})
    assert not list(tmp_path.iterdir())
