"""A layer's forward never waits for the device: nothing in it reads a value, looks for places or copies to
the host. So a CUDA graph can capture a layer, and the caller's thread can run ahead.

Seen without a card: kernels are left out, and the tensors are on torch's device "meta", which has no values
to read; then again on the CPU, where each operator of torch that runs is on a list of those that only launch.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_nibble.kernels.dispatch import choose, quant_linear
from comfyui_nibble.kernels.operator.codes import NVFP4, four_bits
from comfyui_nibble.kernels.operator.spec import GELU_SHIFT, ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.prologue import Gelu, Prologue
from comfyui_nibble.kernels.quant_linear import op
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.evaluation.bench.cases import random_tensors
from comfyui_nibble.quant_core.evaluation.bench.host_cost import launches_left_out, planned_for

# In front of the kernels, on the device: empty tensors, views, and for what torch does itself products and
# elementwise operators. None of them gives a value to Python, and each has a size that is known before.
# (The tests fill empty tensors: fill_.)
LAUNCHES_ONLY = {
    "_to_copy", "_unsafe_view", "abs", "add_.Tensor", "addmm", "addmm_", "alias", "amax", "amin", "bmm",
    "cat", "ceil", "clamp", "clamp_", "detach", "div.Tensor", "empty.memory_format", "empty_like", "exp2",
    "expand", "fill_.Scalar", "full", "gelu", "linalg_vector_norm", "log2", "maximum", "minimum", "mm",
    "mm.out", "mul.Tensor", "mul_.Tensor", "neg", "permute", "reciprocal", "round_", "rsub.Scalar",
    "select.int", "slice.Tensor", "split.Tensor", "transpose.int", "unsqueeze", "view", "view.dtype", "zeros"
}  # fmt: skip
TOKEN, CHANNEL = ActivationSpec(granularity="token"), WeightSpec(granularity="channel")
AFTER_GELU = ActivationSpec(unsigned=True, shift=GELU_SHIFT)
PARTS = {
    "groups": (PartSpec(0, 256, smooth=True, rank=32),),
    "two parts": (
        PartSpec(0, 256, smooth=True, rank=32),
        PartSpec(256, 1280, WeightSpec(), AFTER_GELU, smooth=True, rank=32),
    ),
    "channels": (PartSpec(0, 256, CHANNEL, TOKEN, rotation=256),),
    "learned": (PartSpec(0, 256, CHANNEL, TOKEN, smooth=True, kronecker=(16, 16)),),
    "W8A8": (PartSpec(0, 256, WeightSpec(8, "channel"), ActivationSpec(8, "token"), smooth=True),),
    "weight-only": (PartSpec(0, 256, activation=None),),
}


class Listed(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def forward(spec, target, device, monkeypatch, prologue=None):
    """The operators of torch in a layer's forward on a device without a card."""
    dtype, g = target.matrix_dtype, torch.Generator().manual_seed(0)
    tensors = {k: t.to(device) for k, t in random_tensors(spec, dtype, "cpu", g).items()}
    x = torch.randn(32, spec.in_features, generator=g).to(dtype).to(device)
    monkeypatch.setattr(op, "layer", op._layer)  # behind the operator's name, whose fake meta would take
    with torch.no_grad(), launches_left_out(), planned_for(target), Listed() as listed:
        y = quant_linear(x, spec, tensors, prologue, target)
    assert y.shape == (32, spec.out_features)
    return listed.names


def spec_of(name, lora=0):
    parts = tuple(replace(p, rank=p.rank + lora) for p in PARTS[name])
    return LinearSpec(parts[-1].stop, 128, parts, bias=True)


@pytest.mark.parametrize("arch", [75, 80, 89, 90, 120])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("lora", [0, 16, 128])
def test_a_forward_only_launches(arch, name, lora, monkeypatch):
    spec, target = spec_of(name, lora), Target("cuda", arch, (3, 6))
    # Turing has no int8 product: that layer is torch's alone, and waits no more for it.
    assert (choose(spec, target).path == "eager") is (arch == 75 and name == "W8A8")
    for prologue in (None, Gelu()):
        forward(spec, target, "meta", monkeypatch, prologue)
        assert forward(spec, target, "cpu", monkeypatch, prologue) - LAUNCHES_ONLY == set()


@pytest.mark.parametrize("fixed", [0.0, 0.5])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_scale_of_the_tensor_stays_on_the_device(fixed, smooth, monkeypatch):
    """In front of the fp4 quantizer, which is given it."""
    weight, plain = four_bits(NVFP4)
    activation = replace(plain, either=False, outer="tensor", fixed=fixed)
    part = PartSpec(0, 256, weight, activation, smooth=smooth)
    spec, target = LinearSpec(256, 128, (part,)), Target("cuda", 120, (3, 6))
    assert choose(spec, target).path == "fp4 tensor cores"
    for prologue in (None, Gelu()):
        forward(spec, target, "meta", monkeypatch, prologue)
        found = forward(spec, target, "cpu", monkeypatch, prologue)
        assert found - LAUNCHES_ONLY == set()
        assert ("linalg_vector_norm" in found) is (not fixed)


class Reads(Prologue):
    """Waits for the device, in one of the ways there are."""

    def __init__(self, read):
        self.read = read

    def __call__(self, x):
        self.read(x)
        return x

    def fits(self, spec):
        return False


@pytest.mark.parametrize(
    "read",
    [lambda x: x.max().item(), lambda x: x.cpu(), lambda x: x.nonzero(), lambda x: bool((x > 0).all())],
    ids=["item", "cpu", "nonzero", "bool"],
)
def test_what_waits_is_found(read, monkeypatch):
    with pytest.raises((NotImplementedError, RuntimeError)):
        forward(spec_of("groups"), Target("cuda", 89, (3, 6)), "meta", monkeypatch, Reads(read))
