"""The naive operator against float64 written out by hand, the eager path against the naive one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_nibble.kernels import choose
from comfyui_nibble.kernels.lora import with_lora
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.quant_linear import eager, naive
from comfyui_nibble.tests.codes import layer_error
from comfyui_nibble.tests.kernels.layers import random_tensors, spec_of
from comfyui_nibble.tests.support import relative_error


def by_hand(x, spec, tensors):
    """The formula of the architecture, element by element in float64, for layers without rotation."""
    x = x.double()
    y = torch.zeros(x.shape[0], spec.out_features, dtype=torch.float64)
    column = row = 0
    for i, part in enumerate(spec.parts):
        xp = x[:, part.start : part.stop]
        tx = xp + (part.activation.shift if part.activation else 0)
        if part.smooth:
            tx = tx / tensors["smooth_factor"][part.start : part.stop].double()
        if part.activation:
            act, top = (
                part.activation,
                (
                    2**part.activation.bits - 1
                    if part.activation.unsigned
                    else 2 ** (part.activation.bits - 1) - 1
                ),
            )
            top = max(top, 1)
            width = {"group": act.group, "token": part.width, "tensor": part.width}[act.granularity]
            for k in range(0, part.width, width):
                piece = tx[:, k : k + width]
                scale = (
                    piece.abs().amax(1, keepdim=True)
                    if act.granularity != "tensor"
                    else tx.abs().max().expand(len(tx), 1)
                )
                scale = scale.clamp(min=1e-10) / top
                codes = (
                    torch.where(piece < 0, -1, 1)
                    if act.bits == 1
                    else (piece / scale).round().clamp(0 if act.unsigned else -top, top)
                )
                tx[:, k : k + width] = codes * scale
        codes = unpack(tensors["weight"][:, column : column + part.bytes_per_row], part.weight.bits).double()
        scales = (
            tensors["weight_scale"][row : row + part.scale_rows]
            .double()
            .repeat_interleave(part.width // part.scale_rows, 0)
        )
        y += tx @ (codes * scales.T).T
        if part.rank:
            y += (
                xp
                @ tensors["proj_down"][part.start : part.stop].double()
                @ tensors["proj_up"][:, i * part.rank : (i + 1) * part.rank].double().T
            )
        column, row = column + part.bytes_per_row, row + part.scale_rows
    return y + tensors["bias"].double() if spec.bias else y


SPECS = {
    "svdquant": spec_of(192, 48, smooth=True, rank=16),
    "unsigned": spec_of(192, 48, act=ActivationSpec(unsigned=True, shift=0.171875), smooth=True, rank=16),
    "rtn": spec_of(192, 48, act=ActivationSpec(granularity="token"),
    weight=WeightSpec(granularity="channel")),
    "per tensor": spec_of(192, 48, act=ActivationSpec(granularity="tensor"),
    weight=WeightSpec(granularity="channel")),
    "a8": spec_of(192, 48, act=ActivationSpec(bits=8, granularity="token"),
    weight=WeightSpec(granularity="channel")),
    "2 bit": spec_of(192, 48, act=ActivationSpec(bits=3, granularity="token"),
    weight=WeightSpec(bits=2, granularity="channel")),
    "signs": spec_of(192, 48, act=ActivationSpec(bits=1, granularity="token"),
    weight=WeightSpec(bits=2, granularity="channel")),
    "weight only": spec_of(192, 48, act=None),
    "two parts": LinearSpec(
        256,
        48,
        (PartSpec(0, 64, smooth=True, rank=8),
        PartSpec(64, 256, activation=ActivationSpec(unsigned=True, shift=0.171875), smooth=True, rank=8)),
    ),
    "mixed parts": LinearSpec(
        256, 48, (PartSpec(0, 192, WeightSpec(granularity="channel"), ActivationSpec(granularity="token")),
        PartSpec(192, 256, WeightSpec(bits=8), ActivationSpec(bits=8)))
    ),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", SPECS)
def test_naive_equals_the_formula_in_float64(name):
    spec = SPECS[name]
    tensors = random_tensors(spec)
    x = torch.randn(33, spec.in_features, generator=torch.Generator().manual_seed(1))
    assert (
        layer_error(by_hand(x, spec, tensors), naive.quant_linear(x, spec, tensors), x, spec, tensors) < 1e-6
    )


@pytest.mark.quick
@pytest.mark.parametrize("name", SPECS)
def test_eager_equals_naive(name):
    spec = SPECS[name]
    tensors = random_tensors(spec)
    x = torch.randn(33, spec.in_features, generator=torch.Generator().manual_seed(1))
    lora = [
        (torch.randn(4, spec.in_features), torch.randn(16, 4), 8),
        (torch.randn(2, spec.in_features), torch.randn(48, 2), 0),
    ]
    assert (
        relative_error(
            naive.quant_linear(x, spec, tensors, lora),
            eager.quant_linear(x, *with_lora(spec, tensors, lora, x.dtype)),
        )
        < 1e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    groups=st.integers(1, 5),
    rotation=st.sampled_from([0, 16, 64]),
    smooth=st.booleans(),
    rank=st.sampled_from([0, 1, 17]),
    act=st.sampled_from(["token", "group"]),
    weight=st.sampled_from(["channel", "group"]),
    seed=st.integers(0, 2**31),
)
def test_eager_equals_naive_for_any_shape(m, n, groups, rotation, smooth, rank, act, weight, seed):
    spec = spec_of(
        64 * groups,
        n,
        ActivationSpec(granularity=act),
        WeightSpec(granularity=weight),
        smooth=smooth,
        rotation=rotation,
        rank=rank,
    )
    tensors = random_tensors(spec, seed)
    x = torch.randn(m, spec.in_features, generator=torch.Generator().manual_seed(seed))
    assert relative_error(naive.quant_linear(x, spec, tensors), eager.quant_linear(x, spec, tensors)) < 2e-6


@pytest.mark.quick
@pytest.mark.parametrize("codes", [-8, 7, 0])
def test_extreme_codes_rows_and_outliers(codes):
    spec = spec_of(128, 8, smooth=True)
    tensors = random_tensors(spec, codes=codes)
    x = torch.randn(4, 128)
    x[0] = 0
    x[1, 5] = 1e6
    x[2] = 1.0
    assert (
        layer_error(by_hand(x, spec, tensors), naive.quant_linear(x, spec, tensors), x, spec, tensors) < 1e-6
    )
    assert relative_error(naive.quant_linear(x, spec, tensors), eager.quant_linear(x, spec, tensors)) < 1e-6


def test_bf16_input_keeps_its_dtype_and_stays_close():
    spec = SPECS["svdquant"]
    tensors = random_tensors(spec)
    x = torch.randn(33, 192).bfloat16()
    y = eager.quant_linear(x, spec, tensors)
    assert y.dtype == torch.bfloat16
    assert relative_error(naive.quant_linear(x, spec, tensors), y) < 0.01


@pytest.mark.quick
def test_dispatch_says_why():
    assert str(choose(SPECS["svdquant"], "cpu")).startswith(
        "eager; triton: needs a GPU; int8 products of torch: "
    )
