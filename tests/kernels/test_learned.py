"""Layers with learned Kronecker transforms: in the quantizer where a kernel takes them, else torch transforms
x for the kernels."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels import choose, paths_of
from comfyui_nibble.kernels.dispatch import FUSED, quant_linear
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.prologue import Gelu, LayerNormModulate
from comfyui_nibble.kernels.quant_linear import fused, naive
from comfyui_nibble.kernels.target import Target, interpreter
from comfyui_nibble.tests.kernels.layers import (
    LIMIT,
    check_on_equal_codes,
    inputs,
    output_error,
    with_branches,
)
from comfyui_nibble.tests.support import relative_error

CHANNEL, TOKEN = WeightSpec(4, "channel"), ActivationSpec(4, "token")
SHARED = PartSpec(0, 256, CHANNEL, TOKEN, smooth=True, kronecker=(8, 16))
ROWS_OF_9 = PartSpec(0, 288, CHANNEL, TOKEN, smooth=True, kronecker=(16, 9))
GROUPS = PartSpec(0, 256, CHANNEL, ActivationSpec(4, "group"), kronecker=(8, 16))
SPECS = {
    "shared": LinearSpec(256, 96, (SHARED,)),
    "per slice": LinearSpec(256, 96, (PartSpec(0, 256, CHANNEL, TOKEN, smooth=True, kronecker=(8, 8),
    per_slice=True),)),
    "beside a plain part": LinearSpec(
        512, 96, (replace(SHARED, rank=4), PartSpec(256, 512, CHANNEL, TOKEN, smooth=True, rank=4))
    ),
    "parts alike": LinearSpec(768, 96, tuple(replace(SHARED, start=256 * i, stop=256 * (i + 1),
    rank=4) for i in range(3))),
    "rows of 9": LinearSpec(288, 96, (ROWS_OF_9,)),
    "one bit": LinearSpec(256, 96, (replace(SHARED, weight=WeightSpec(2, "channel"),
    activation=ActivationSpec(1, "token", clip=0.3)),)),
    "group scales": LinearSpec(256, 96, (GROUPS,)),
    "weight-only": LinearSpec(256, 96, (PartSpec(0, 256, CHANNEL, None, smooth=True, kronecker=(8, 16)),)),
}  # fmt: skip
TORCH = ("group scales", "weight-only")  # the kernels take x as torch has transformed it


def tensors_of(spec, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in spec.shapes().items():
        if name == "weight":
            out[name] = torch.randint(-128, 128, shape, dtype=torch.int8, generator=g)
        elif name in ("weight_scale", "smooth_factor"):
            out[name] = torch.rand(shape, generator=g) + 0.5
        else:
            out[name] = torch.randn(shape, generator=g) * 0.2
    return out


def lora_of(spec):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, spec.in_features, generator=g) * 0.1, torch.randn(32, 4, generator=g), 16)]


@pytest.mark.parametrize("name", SPECS)
def test_eager_agrees_with_the_specification(name):
    spec = SPECS[name]
    tensors, x, lora = tensors_of(spec), inputs(33, spec.in_features), lora_of(spec)
    assert (
        relative_error(naive.quant_linear(x, spec, tensors, lora), with_branches(x, spec, tensors, lora))
        < 1e-5
    )
    assert (
        relative_error(
            naive.quant_linear(Gelu()(x), spec, tensors), quant_linear(x, spec, tensors, prologue=Gelu())
        )
        < 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_kernels_agree_with_the_specification(name, dtype, monkeypatch):
    """The kernel's transform has roundings to 11 bits; where torch transforms, it hands on the dtype of x."""
    spec, calls = SPECS[name], []
    tensors, x, lora = tensors_of(spec), inputs(33, spec.in_features, dtype), lora_of(spec)
    real = fused.quantize_kronecker
    monkeypatch.setattr(fused, "quantize_kronecker", lambda *args: calls.append(args[7]) or real(*args))
    expected = [] if name in TORCH else [3] if name == "parts alike" else [1]
    for before in (None, Gelu()):
        calls.clear()
        if spec.weight_only:
            got = with_branches(x, spec, tensors, lora, before, interpreter())
            assert output_error(got, x if before is None else before(x), spec, tensors, lora) < LIMIT[dtype]
        else:
            check_on_equal_codes(x, spec, tensors, lora, before, roundings=1 if before is None else 2)
        assert calls == expected


@pytest.mark.parametrize("name", ["shared", "parts alike"])
def test_layernorm_in_front(name):
    """In the quantizer for one part; of several each sees only its own channels, so torch computes it."""
    spec = SPECS[name]
    tensors, x = tensors_of(spec), inputs(12, spec.in_features, torch.bfloat16)
    before = LayerNormModulate(
        0.3 * inputs(2, spec.in_features, torch.bfloat16, 5),
        0.3 * inputs(2, spec.in_features, torch.bfloat16, 6),
    )
    assert before.fits(spec) == (name == "shared")
    check_on_equal_codes(x, spec, tensors, prologue=before, roundings=3)


def test_transform_of_each_part_reads_its_own_factors():
    spec = SPECS["per slice"]
    tensors = tensors_of(spec)
    pairs = tensors["transform"].view(4, 128)
    ((left, right),) = spec.factors(tensors)
    assert torch.equal(left, pairs[:, :64].view(4, 8, 8))
    assert torch.equal(right, pairs[:, 64:].view(4, 8, 8))


def card(arch):
    return Target("hip" if isinstance(arch, str) else "cuda", arch, (3, 6))


def one_part(sizes, slices, **kwargs):
    width = sizes[0] * sizes[1] * slices
    return LinearSpec(width, 96, (PartSpec(0, width, CHANNEL, TOKEN, kronecker=sizes, **kwargs),))


@pytest.mark.parametrize(
    ("arch", "path"), [(89, "int4 tensor cores"), (90, "int8 tensor cores"), ("gfx942", "int8 tensor cores")]
)
def test_transform_is_in_the_quantizer(arch, path):
    for spec in (SPECS["shared"], SPECS["per slice"], SPECS["beside a plain part"], one_part((24, 32), 4)):
        choice = choose(spec, card(arch))
        assert choice.path == path
        assert FUSED not in dict(choice.refused)


@pytest.mark.parametrize(
    ("spec", "arch", "reason"),
    [
        (SPECS["group scales"], 120, "one activation scale each 64 channels"),
        (SPECS["weight-only"], 89, "weight-only layer"),
        (SPECS["shared"], 75, "Triton has no 16-bit tensor-core product for sm_75"),
        (
            SPECS["rows of 9"],
            89,
            "slices of 16 x 9 channels, odd rows of which two codes of one byte would be in two",
        ),
        (SPECS["rows of 9"], 90, None),
        (one_part((48, 64), 4), 86, None),
        (one_part((96, 128), 1), 86, None),
        (
            one_part((48, 64), 8),
            90,
            "8 slices of 64 x 64 after padding, above 128 a side or 16384 values a token",
        ),
        (
            one_part((8, 136), 1),
            90,
            "1 slices of 16 x 256 after padding, above 128 a side or 16384 values a token",
        ),
        (
            one_part((48, 64), 4, per_slice=True),
            90,
            "4 slices of 64 x 64 after padding, above 128 a side or 8192 values a token",
        ),
        (
            one_part((64, 128), 1),
            "gfx942",
            "1 slices of 64 x 128 after padding, above 64 a side or 16384 values a token",
        ),
        (one_part((32, 32), 16), 130, None),
    ],
)
def test_reason_why_torch_transforms(spec, arch, reason):
    choice = choose(spec, card(arch))
    assert choice.path != "eager"
    assert dict(choice.refused).get(FUSED) == reason
    lines = paths_of({"layer": spec}, card(arch))[1]
    assert (f"; {FUSED}: {reason}" in lines[1]) == (reason is not None)


def test_shared_memory_of_the_card_is_counted():
    spec = one_part((96, 128), 1)
    assert (
        dict(choose(spec, interpreter()).refused)[FUSED]
        == "slices of 96 x 128 channels take 96 KiB of shared memory, the CPU has 64"
    )
