"""Layers with learned Kronecker transforms: torch transforms x, the kernels do the rest."""

import pytest
import torch

from comfyui_nibble.kernels import quant_linear
from comfyui_nibble.kernels.before import Gelu
from comfyui_nibble.kernels.dispatch import choose
from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.kernels.target import Target, interpreter
from comfyui_nibble.quant_core.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.tests.support import relative_error

CHANNEL, TOKEN = WeightSpec(4, "channel"), ActivationSpec(4, "token")
SHARED = PartSpec(0, 256, CHANNEL, TOKEN, smooth=True, kronecker=(8, 16))
SPECS = {
    "shared": LinearSpec(256, 96, (SHARED,)),
    "per slice": LinearSpec(256, 96, (PartSpec(0, 256, CHANNEL, TOKEN, smooth=True, kronecker=(8, 8), per_slice=True),)),
    "beside a plain part": LinearSpec(
        384, 96, (PartSpec(0, 256, CHANNEL, TOKEN, smooth=True, rank=4, kronecker=(8, 16)), PartSpec(256, 384, CHANNEL, TOKEN, smooth=True, rank=4))
    ),
}  # fmt: skip


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


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("where", ["eager", "kernels"])
def test_agrees_with_the_specification(name, where):
    spec = SPECS[name]
    tensors, g = tensors_of(spec), torch.Generator().manual_seed(1)
    x = torch.randn(33, spec.in_features, generator=g)
    lora = [(torch.randn(4, spec.in_features, generator=g) * 0.1, torch.randn(32, 4, generator=g), 16)]
    want = naive.quant_linear(x, spec, tensors, lora)
    if where == "eager":
        assert relative_error(want, quant_linear(x, spec, tensors, lora)) < 1e-5
        assert relative_error(naive.quant_linear(Gelu()(x), spec, tensors), quant_linear(x, spec, tensors, before=Gelu())) < 1e-5
    else:
        # 0.032 at most: x is rounded to bf16 after the transform, and 4-bit codes flip.
        got = quant_linear(x.bfloat16(), spec, tensors, lora, target=interpreter())
        assert relative_error(naive.quant_linear(x.bfloat16().float(), spec, tensors, lora), got) < 0.04


def test_transform_of_each_part_reads_its_own_factors():
    spec = SPECS["per slice"]
    tensors = tensors_of(spec)
    pairs = tensors["transform"].view(4, 128)
    ((left, right),) = spec.factors(tensors)
    assert torch.equal(left, pairs[:, :64].view(4, 8, 8))
    assert torch.equal(right, pairs[:, 64:].view(4, 8, 8))


@pytest.mark.parametrize(("arch", "path"), [(89, "int4 tensor cores"), (90, "int8 tensor cores")])
def test_takes_the_fast_path(arch, path):
    assert choose(SPECS["shared"], Target("cuda", arch, (3, 6))).path == path
