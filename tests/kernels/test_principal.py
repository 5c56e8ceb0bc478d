"""Principal components: the operator on every path, against the formula in float64."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.dispatch import choose, quant_linear
from comfyui_nibble.kernels.lora import with_lora
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, SpecError, WeightSpec
from comfyui_nibble.kernels.operator.text import parse
from comfyui_nibble.kernels.operator.transforms import hadamard
from comfyui_nibble.kernels.quant_linear import eager, naive, torch_int8
from comfyui_nibble.kernels.target import Target, interpreter, triton_version
from comfyui_nibble.quant_core.formats.spec_json import from_json, to_json
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.tests.kernels.layers import CHANNEL, G64_WEIGHT, TOKEN, random_tensors
from comfyui_nibble.tests.support import relative_error

N = 48
EIGHT = ActivationSpec(8, "token")
LAYERS = {
    "groups": [(192, ActivationSpec(), G64_WEIGHT, 0, 5)],
    "H64": [(128, ActivationSpec(), G64_WEIGHT, 64, 8)],
    "a token": [(128, TOKEN, CHANNEL, 128, 3)],
    "two parts": [(64, ActivationSpec(), G64_WEIGHT, 0, 8), (128, ActivationSpec(), G64_WEIGHT, 64, 2)],
    "8 bit": [(128, EIGHT, WeightSpec(8, "channel"), 64, 4)],
}
RANK = 8


def layer(name, smooth=True):
    """(spec, tensors) whose components have orthonormal directions, as a fit leaves them."""
    parts, edge = [], 0
    for width, act, weight, rotation, count in LAYERS[name]:
        parts.append(PartSpec(edge, edge + width, weight, act, smooth, rotation, RANK, principal=count))
        edge += width
    spec = LinearSpec(edge, N, tuple(parts))
    tensors = random_tensors(spec, dtype=torch.bfloat16)
    for part in parts:
        rows = slice(part.start, part.stop)
        g = torch.Generator().manual_seed(part.start)
        v = torch.linalg.qr(torch.randn(part.width, part.principal, generator=g))[0]
        down = v / tensors["smooth_factor"][rows].float()[:, None] if smooth else v
        tensors["proj_down"][rows, : part.principal] = down.bfloat16()
    return spec, tensors


def tokens(spec, rows=33, dtype=torch.bfloat16):
    """With three strong directions."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(rows, spec.in_features, generator=g)
    return (x + 8 * torch.randn(rows, 3, generator=g) @ torch.randn(3, spec.in_features, generator=g)).to(
        dtype
    )


def by_hand(x, spec, tensors):
    """y in float64: Q(T x - T V (T V)^t) Qw + x D U + b with x D in the dtype of x where it is taken out."""
    y, column, row = torch.zeros(len(x), N, dtype=torch.float64), 0, 0
    for i, part in enumerate(spec.parts):
        rows, act = slice(part.start, part.stop), part.activation
        xp, down = x[:, rows], tensors["proj_down"][rows]
        taken = down[:, : part.principal]
        tx, back = xp.double(), taken.double()
        if part.smooth:
            s = tensors["smooth_factor"][rows]
            tx, back = tx / s.double(), (taken.float() * s.float()[:, None]).bfloat16().double()
        tx = tx - (xp @ taken.to(x.dtype)).double() @ back.T
        if part.rotation:
            tx = tx @ torch.block_diag(*[hadamard(part.rotation).double()] * (part.width // part.rotation))
        top, step = 2 ** (act.bits - 1) - 1, 64 if act.granularity == "group" else part.width
        groups = tx.unflatten(1, (-1, step))
        scale = groups.abs().amax(-1, keepdim=True) / top
        tx = ((groups / scale).round() * scale).flatten(1)
        codes = unpack(tensors["weight"][:, column : column + part.bytes_per_row], part.weight.bits).double()
        scales = tensors["weight_scale"][row : row + part.scale_rows].double()
        y += tx @ (codes * scales.T.repeat_interleave(part.width // part.scale_rows, 1)).T
        y += xp.double() @ down.double() @ tensors["proj_up"][:, i * RANK : (i + 1) * RANK].double().T
        column, row = column + part.bytes_per_row, row + part.scale_rows
    return y + tensors["bias"].double()


@pytest.mark.quick
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_naive_is_the_formula(name, smooth):
    spec, tensors = layer(name, smooth)
    x = tokens(spec)
    # A code at an edge may go either way in fp32: 1 in 4,000 of 8 bits, fewer of 4.
    assert relative_error(by_hand(x, spec, tensors), naive.quant_linear(x, spec, tensors)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_eager_is_naive(name, dtype):
    spec, tensors = layer(name)
    x = tokens(spec, dtype=dtype)
    limit = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    # naive takes h in the dtype of x as well; fp16's is fp32 here, whose sums may leave it.
    want = naive.quant_linear(x, spec, tensors)
    assert relative_error(want, eager.quant_linear(x, spec, tensors).float()) < limit


@pytest.mark.parametrize("name", ["a token", "8 bit"])
def test_torch_int8_is_naive(name):
    spec, tensors = layer(name)
    x = tokens(spec, dtype=torch.float32)
    assert (
        relative_error(naive.quant_linear(x, spec, tensors), torch_int8.quant_linear(x, spec, tensors)) < 1e-5
    )


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_naive(name):
    """In the interpreter, beside a LoRA, which sees the raw x. Another order of sums moves codes at edges,
    and a rotation is one of values in bf16: without components these layers are off by 0.015, too."""
    spec, tensors = layer(name)
    x = tokens(spec)
    g = torch.Generator().manual_seed(3)
    lora = [(torch.randn(4, spec.in_features, generator=g) / 16, torch.randn(N, 4, generator=g) / 4, 0)]
    assert "tensor cores" in choose(spec, interpreter()).path
    want = naive.quant_linear(x, spec, tensors, lora)
    merged = with_lora(
        spec, tensors, [(down.bfloat16(), up.bfloat16(), first) for down, up, first in lora], x.dtype
    )
    assert merged[0].parts[0].principal == spec.parts[0].principal
    limit = 0.03 if any(p.rotation for p in spec.parts) else 0.008
    assert relative_error(want, quant_linear(x, *merged, target=interpreter()).float()) < limit
    plain = naive.quant_linear(
        x, replace(spec, parts=tuple(replace(p, principal=0) for p in spec.parts)), tensors
    )
    assert relative_error(want, plain) > 0.1  # what is compared here does change the result


def test_without_bf16_the_eager_path_runs():
    spec, tensors = layer("H64")
    found = choose(spec, Target("cuda", 75, triton_version()))
    assert found.path == "eager"
    assert dict(found.refused)["int4 tensor cores"] == "principal components in fp16"
    x = tokens(spec, dtype=torch.float16)
    assert torch.equal(
        quant_linear(x, spec, tensors, target=interpreter()), eager.quant_linear(x, spec, tensors)
    )


def test_where_registers_end_the_reason_is_said():
    spec, _ = layer("a token")
    found = choose(spec, Target("hip", "gfx1100", triton_version()))
    assert found.path == "eager"
    assert "3 principal components beside Hadamard blocks of 128 channels" in str(found)


def test_the_effective_weight_is_what_the_layer_applies():
    """On a layer whose activations have 8 bits, so that rounding x is little."""
    spec, tensors = layer("8 bit")
    made = QuantizedLayer("a", spec, tensors)
    x = tokens(spec, dtype=torch.float32)
    y = naive.quant_linear(x, spec, tensors) - tensors["bias"].float()
    assert relative_error(x @ made.dequantize().T, y) < 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_specs_survive_json_and_text(name):
    spec, _ = layer(name)
    assert from_json(to_json(spec)) == spec
    assert parse(spec.text) == spec
    assert "principal" not in str(
        to_json(replace(spec, parts=tuple(replace(p, principal=0) for p in spec.parts)))
    )
    assert f"p{max(spec.parts, key=lambda p: p.width).principal}" in spec.describe()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 4, "principal": 5}, "columns of the low rank: expected 0 to 4, found 5"),
        ({"rank": 4, "principal": -1}, "expected 0 to 4, found -1"),
        ({"rank": 4, "principal": 4, "activation": None}, "go with quantized activations"),
        ({"rank": 4, "principal": 4, "kronecker": (8, 8)}, "without a shift or a learned transform"),
        (
            {"rank": 4, "principal": 4, "activation": ActivationSpec(unsigned=True, shift=0.25)},
            "without a shift",
        ),
    ],
)
def test_contradictions_are_named(options, text):
    with pytest.raises(SpecError, match=text):
        PartSpec(0, 64, **options)
