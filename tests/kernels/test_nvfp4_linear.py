"""Layers on the nvfp4 grid by the fp4 kernels in the interpreter, and which path they take on which card."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels import spec_at_load
from comfyui_nibble.kernels.at_load import paths_of
from comfyui_nibble.kernels.dispatch import choose, quant_linear
from comfyui_nibble.kernels.operator.codes import NVFP4, ActivationSpec
from comfyui_nibble.kernels.prologue import Gelu, LayerNormModulate
from comfyui_nibble.kernels.target import Target, interpreter
from comfyui_nibble.tests.kernels.layers import (
    LIMIT,
    NVFP4_ACT,
    NVFP4_WEIGHT,
    inputs,
    output_error,
    random_tensors,
    side_by_side,
    spec_of,
    with_branches,
)
from comfyui_nibble.tests.support import relative_error

HALF, BF16 = torch.float16, torch.bfloat16
TOKEN8 = ActivationSpec(8, "token")
K, N = 192, 40
SIX = ActivationSpec(group=16, grid=NVFP4)
TENSOR = replace(SIX, outer="tensor")
FIXED = replace(TENSOR, fixed=1.25e-3)  # the largest of x is 3.4 to 3.9, so that some scales are clamped
HALVES = (64, NVFP4_ACT, NVFP4_WEIGHT), (192, NVFP4_ACT, NVFP4_WEIGHT)
# (spec, how much of a step a value before its code may be off by; a code that flips moves the output)
SPECS = {
    "plain": (spec_of(K, N, SIX, NVFP4_WEIGHT), 0),
    "either": (spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, bias=False), 0),
    "smooth, low rank": (spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, smooth=True, rank=17), 0),
    "two parts": (side_by_side(N, *HALVES, smooth=True, rank=16), 0),
    "of the tensor": (spec_of(K, N, TENSOR, NVFP4_WEIGHT), 0),
    "of the tensor, smooth": (spec_of(K, N, TENSOR, NVFP4_WEIGHT, smooth=True, rank=17), 0),
    "of tensors": (side_by_side(N, (64, TENSOR, NVFP4_WEIGHT), (192, TENSOR, NVFP4_WEIGHT), rank=16), 0),
    "fixed": (spec_of(K, N, FIXED, NVFP4_WEIGHT, bias=False), 0),
    "a rank beside": (spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, rank=80), 0),
    "rotated": (spec_of(256, N, NVFP4_ACT, NVFP4_WEIGHT, smooth=True, rank=16, rotation=256), 1),
    "rotated by 64": (spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, rotation=64), 1),
    "principal": (spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT, smooth=True, rank=16, principal=4), 1),
}
FLIPS = 4e-2  # rotated in bf16 where x is smoothed; the error of the grid itself is 1e-1


def tensors_of(spec, dtype):
    tensors = random_tensors(spec, dtype=dtype)
    return tensors | ({"proj_down": tensors["proj_down"] * 0.05} if spec.rank else {})


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_kernels_are_the_specification(name, dtype):
    (spec, flips), x = SPECS[name], inputs(35, SPECS[name][0].in_features, dtype)
    tensors = tensors_of(spec, dtype)
    refused = name == "principal" and dtype == HALF
    y = quant_linear(x, spec, tensors, target=interpreter())
    assert choose(spec, interpreter()).path == "fp4 tensor cores"
    assert y.dtype == dtype
    limit = LIMIT[dtype] if not flips or refused else FLIPS
    assert output_error(y, x, spec, tensors) < limit
    assert quant_linear(x[:0], spec, tensors, target=interpreter()).shape == (0, N)


@pytest.mark.parametrize("act", [NVFP4_ACT, TENSOR, FIXED], ids=["token", "tensor", "fixed"])
def test_lora_and_the_steps_in_front(act):
    spec = spec_of(K, N, act, NVFP4_WEIGHT, smooth=True, rank=16)
    tensors, x = tensors_of(spec, HALF), inputs(24, K, HALF)
    lora = [(inputs(4, K, HALF, 5) * 0.05, inputs(N, 4, HALF, 6), 0)]
    assert (
        output_error(with_branches(x, spec, tensors, lora, target=interpreter()), x, spec, tensors, lora)
        < 5e-4
    )
    scale, shift = inputs(2, K, HALF, 7) * 0.1, inputs(2, K, HALF, 8) * 0.1
    for prologue in (Gelu(), LayerNormModulate(scale, shift)):
        y = quant_linear(x, spec, tensors, prologue, interpreter())
        assert relative_error(quant_linear(prologue(x), spec, tensors, target=interpreter()), y) < 5e-3


def test_padded_and_ordered():
    spec = spec_of(K, N, NVFP4_ACT, NVFP4_WEIGHT)
    for changed in (replace(spec, in_features=K - 20, padding=20), replace(spec, order=True)):
        tensors, x = random_tensors(changed, dtype=HALF), inputs(9, changed.in_features, HALF)
        if changed.order:
            tensors["channel_order"] = torch.randperm(K, generator=torch.Generator().manual_seed(0)).int()
        assert (
            output_error(quant_linear(x, changed, tensors, target=interpreter()), x, changed, tensors) < 5e-4
        )


@pytest.mark.quick
def test_paths_and_the_form_at_load(monkeypatch):
    spec = SPECS["smooth, low rank"][0]
    card = lambda arch: Target("cuda", arch, (3, 6))
    for arch in (100, 103, 120):
        assert choose(spec, card(arch)).path == "fp4 tensor cores"
        assert spec_at_load(spec, card(arch)) is spec
    for arch, path in ((80, "int8"), (89, "int8"), (90, "int8")):
        assert choose(spec, card(arch)).path == "eager"
        eight = spec_at_load(spec, card(arch))
        assert eight == spec.as_int8()
        assert choose(eight, card(arch)).path == f"{path} tensor cores"
        found, _ = paths_of({"layer": spec}, card(arch))
        assert found == {"layer": "int8 tensor cores as W8A8"}
    for act, reason in ((TENSOR, "one outer scale for the tensor that a rotation"), (FIXED, None)):
        rotated = choose(spec_of(K, N, act, NVFP4_WEIGHT, rotation=64), card(120))
        assert (reason or "fp4 tensor cores") in str(rotated)
        assert choose(spec_of(K, N, act, NVFP4_WEIGHT), card(120)).path == "fp4 tensor cores"
        assert spec_at_load(spec_of(K, N, act, NVFP4_WEIGHT), card(89)).parts[0].activation == TOKEN8
    monkeypatch.setenv("NIBBLE_INT8", "0")
    assert spec_at_load(spec, card(89)) is spec
    odd = spec_of(80, N, NVFP4_ACT, NVFP4_WEIGHT)
    assert "80 channels, not a multiple of 64" in str(choose(odd, card(120)))
    assert choose(spec_of(K, N, None, NVFP4_WEIGHT), card(120)).path == "eager"
    integers = replace(spec, parts=(replace(spec.parts[0], activation=ActivationSpec(8)),))
    assert "integer activations" in str(choose(integers, card(120)))
