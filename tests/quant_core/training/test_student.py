"""Layers in training: the operator they start as, their gradients, what they are packed to."""

import pytest
import torch

from comfyui_nibble.kernels.operator.packing import pack, unpack
from comfyui_nibble.kernels.operator.quantizers import quantize
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.methods import METHODS, by_name, fit_problem
from comfyui_nibble.quant_core.training.student import (
    CLIP_START,
    KINDS,
    Factor,
    Student,
    cayley,
    round_through,
)
from comfyui_nibble.tests.codes import layer_error
from comfyui_nibble.tests.support import relative_error, sqnr_db

FAST = {"smooth": ((0.5, 0.5),), "iterations": 1, "finalists": 1, "rank": 16}


def fitted(problem, name, **options):
    method = by_name(name)
    known = {k: v for k, v in (FAST | options).items() if hasattr(method.config, k)}
    return fit_problem(problem, method, method.configured(**known)).layer


def codes(layer: QuantizedLayer):
    return torch.cat(
        [unpack(packed, spec.weight.bits) for spec, packed, _, _ in layer.spec.split(layer.tensors)], 1
    )


TWO = (Part(0, 256), Part(256, 512, True))
# Principal components are not trained: tests/quant_core/methods/test_principal.py.
CASES = [(name, None) for name in METHODS if name != "svdquant_p"] + [
    ("svdquant", TWO),
    ("splitquant", TWO),
    ("splitquant_4", TWO),
    ("robuq", TWO),
]


@pytest.fixture(params=CASES, ids=lambda c: c[0] + " of two parts" * (c[1] is not None))
def started(request, make_problem):
    """(problem, a method's fit of it)."""
    name, parts = request.param
    problem = make_problem(96, 512 if parts else 256, parts)
    return problem, fitted(problem, name)


def test_untouched_it_is_packed_to_where_it_started(started):
    """Codes of GPTQ too. `clip` alone may move: ranges of all of absmax start at CLIP_START."""
    problem, start = started
    layer = Student(problem, start, ("scale", "threshold", "low_rank", "rounding", "bias")).layer()
    assert layer.spec == start.spec
    assert torch.equal(codes(layer), codes(start))
    x = problem.tokens("report")
    assert layer_error(start(x), layer(x), x, start.spec, start.tensors) < 1e-6
    for key, tensor in start.tensors.items():
        assert relative_error(tensor, layer.tensors[key]) < 1e-6, key


@pytest.mark.arithmetic
def test_forward_is_the_packed_operator(started):
    """fp32 here, a 16-bit low rank and folded constants there."""
    problem, start = started
    student, x = Student(problem, start, ("scale", "bias")), problem.tokens("report")
    with torch.no_grad():
        y = student(x)
        assert layer_error(start(x), y, x, start.spec, start.tensors) < 1e-5
        assert relative_error(start(x), problem_output(problem, x)) > 3e-2  # and not the full-precision layer
        torch.testing.assert_close(student(x, slice(8, 40)), y[:, 8:40], rtol=1e-4, atol=1e-4)
        assert student(x.bfloat16()).dtype == torch.bfloat16


def test_forward_is_what_is_packed_after_training(started):
    """All kinds moved at random: what trains is what is stored."""
    problem, start = started
    student, x = Student(problem, start, KINDS, affine=True), problem.tokens("report")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = student(x)
        for name, p in student.named_parameters():
            if name.endswith(("u", "v", "d", "smooth", "scale", "clip", "down", "up")):
                p += 0.02 * p.abs().mean().clamp(min=0.3) * torch.randn(p.shape, generator=g)
        student.renew()
        after = student(x)
        assert relative_error(before, after) > 0.01
        # bf16 factors, smoothing and scales: 2^-9 each.
        assert relative_error(student.layer()(x), after) < 0.05


def problem_output(problem, x):
    return x @ problem.weight.float().T + problem.bias.float()


# -- gradients


@pytest.mark.quick
def test_rounding_passes_the_gradient():
    x = torch.tensor([-1.5, -0.4, 0.5, 1.5, 2.5], requires_grad=True)
    y = round_through(x)
    assert y.tolist() == [-2.0, -0.0, 0.0, 2.0, 2.0]  # half to even
    (3 * y).sum().backward()
    assert x.grad.tolist() == [3.0] * 5


def one_layer(make_problem, shrink):
    """A layer rounded to nearest per channel, its range `shrink` times that of its weights."""
    problem = make_problem(8, 64, calibrated=False)
    start = fitted(problem, "rtn")
    scale = start.tensors["weight_scale"].float() * shrink
    packed = pack(quantize(problem.weight.float(), scale.T, 4, "channel"), 4)
    return problem, QuantizedLayer(
        start.name, start.spec, start.tensors | {"weight": packed, "weight_scale": scale}
    )


@pytest.mark.quick
@pytest.mark.parametrize("shrink", [1.02, 0.4])
def test_gradient_of_a_scale_is_lsq_s(make_problem, shrink):
    """q - w / s inside the range, the largest code outside (LSQ, equation 3), times s as log s is what is
    trained."""
    problem, start = one_layer(make_problem, shrink)
    student = Student(problem, start, ("scale",))
    # One-hot tokens are exact at 4 bits: the output is the rounded weight. `rounding` is a constant: 0 inside
    # its cell.
    direction = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    student.bias.requires_grad_(False)
    (student(torch.eye(64)) * direction).sum().backward()
    weight, scale = problem.weight.float(), start.tensors["weight_scale"].float().T
    real = weight / scale
    inside = real.abs() < 7
    assert inside.all() == (shrink > 1)
    codes = real.round().clamp(-7, 7)
    slope = torch.where(inside, codes - real, codes)
    # The start moves a weight in the last 0.01 of its cell, and those outside to the edge of the last one.
    got = student.parts[0].scale.grad
    assert relative_error((slope * direction.T).sum(1, keepdim=True) * scale, got) < 0.02


def test_gradient_of_the_activations_range(make_problem):
    """Where x is beyond its clip the gradient reaches the clip, not x."""
    problem, start = one_layer(make_problem, 1.02)
    student = Student(problem, start, ("clip",))
    assert student.parts[0].clip.sigmoid().item() == pytest.approx(CLIP_START, abs=1e-6)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    top = int(x.abs().argmax())
    x.requires_grad_()
    student(x).sum().backward()
    # d y / d clip: codes - x / s inside, +-7 outside, times the row sums and d s / d clip = absmax / 7.
    rounded = student(torch.eye(64)).detach() - student.bias
    clip, absmax = CLIP_START, float(x.detach().abs().max())
    real = x.detach()[0] / (absmax * clip / 7)
    slope = torch.where(real.abs() < 7, real.round() - real, real.sign() * 7)
    want = float((slope @ rounded.sum(1)) * absmax / 7 * clip * (1 - clip))
    assert real[top].abs() > 7
    assert student.parts[0].clip.grad.item() == pytest.approx(want, rel=2e-2)
    assert torch.isfinite(x.grad).all()


def test_gradient_of_the_rounding(make_problem):
    """Straight through: each offset moves the output by its scale."""
    problem, start = one_layer(make_problem, 1.02)
    student = Student(problem, start, ("rounding",))
    student(torch.eye(64)).sum().backward()
    scale = start.tensors["weight_scale"].float().T.expand(8, 64)
    torch.testing.assert_close(student.parts[0].rounding.grad, scale, rtol=1e-5, atol=0)


# -- transforms


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(4, 4), (1, 16, 16), (3, 9, 9)])
@pytest.mark.parametrize("size", [0.0, 0.1, 30.0])
def test_cayley_is_a_rotation(shape, size):
    a = size * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = cayley(a)
    eye = torch.eye(shape[-1], dtype=torch.float64).expand(shape)
    assert (q @ q.mT - eye).abs().max() < 1e-13
    torch.testing.assert_close(torch.linalg.det(q), torch.ones(shape[:-2], dtype=torch.float64))
    if size == 0:
        assert torch.equal(q, eye)
    else:
        assert relative_error(eye, q) > 0.1


@pytest.mark.quick
@pytest.mark.parametrize("affine", [False, True])
def test_both_of_a_factor_are_inverse(affine):
    g = torch.Generator().manual_seed(0)
    start = torch.linalg.qr(torch.randn(2, 12, 12, generator=g))[0] * (
        0.5 + torch.rand(2, 12, 1, generator=g)
    )
    factor = Factor(start, affine)
    p, back = factor.both()
    assert relative_error(start, p) < 1e-6
    with torch.no_grad():
        for parameter in factor.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    p, back = factor.both()
    assert relative_error(torch.eye(12).expand(2, 12, 12), p @ back.mT) < 1e-5
    assert relative_error(start, p) > 0.1
    # Orthogonal moves keep the singular values, affine ones do not.
    kept = torch.allclose(torch.linalg.svdvals(p), torch.linalg.svdvals(start), rtol=1e-4)
    assert kept == (not affine)


# -- what is trained

LEAVES = {
    "transform": {"u"}, "smooth": {"smooth"}, "clip": {"clip"}, "scale": {"scale"},
    "threshold": {"threshold"},
    "low_rank": {"down", "up"}, "rounding": {"rounding"}, "bias": {"bias"},
}  # fmt: skip
ABSENT = {"splitquant_4": {"threshold", "low_rank"}, "robuq": {"transform"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ABSENT)
def test_only_what_was_asked_for_is_trained(make_problem, name, kind):
    problem = make_problem(32, 256)
    student = Student(problem, fitted(problem, name), (kind,))
    trained = {n.rpartition(".")[2] for n, p in student.named_parameters() if p.requires_grad}
    # Where smoothing moves, so does the weight: there is nothing fixed to round otherwise.
    assert trained == (set() if kind in ABSENT[name] else LEAVES[kind])
    groups = student.groups(0.5)
    assert [g["lr"] for g in groups] == [0.5 * KINDS[kind]] * bool(trained)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in student.parameters())
    if trained:
        student(problem.tokens("select")).square().mean().backward()
        assert all((p.grad is not None) == p.requires_grad for p in student.parameters())
        assert all(p.grad.abs().sum() > 0 for p in student.parameters() if p.requires_grad)


def test_bias_is_made_where_there_is_none(make_problem):
    problem = make_problem(32, 128, bias=False)
    start = fitted(problem, "convrot")
    assert Student(problem, start, ("scale",)).layer().spec == start.spec
    student = Student(problem, start, ("bias",))
    with torch.no_grad():
        student.bias += 1.0
        assert torch.equal(student.layer()(torch.zeros(2, 128)), torch.ones(2, 32))


@pytest.mark.parametrize(
    ("name", "kinds", "gain"),
    [
        ("convrot", ("scale",), 0.8),
        ("robuq", ("scale", "threshold", "rounding"), 1.5),
        ("splitquant_4", ("transform", "smooth"), 0.5),
    ],
)
def test_training_on_a_layer_s_output(make_problem, name, kinds, gain):
    """The held-out error falls by at least `gain` dB in 40 steps."""
    problem = make_problem(96, 256)
    student = Student(problem, fitted(problem, name, rank=0, gptq=False), kinds)
    fit, held = problem.tokens("select"), problem.tokens("report")
    before = sqnr_db(problem_output(problem, held), student.layer()(held))
    optimizer = torch.optim.AdamW(student.groups(5e-3), weight_decay=0.0)
    for _ in range(40):
        student.renew()
        optimizer.zero_grad()
        (student(fit) - problem_output(problem, fit)).square().mean().backward()
        optimizer.step()
    student.renew()
    after = sqnr_db(problem_output(problem, held), student.layer()(held))
    assert after > before + gain
