"""Large activations in fp16: what full precision keeps finite stays finite, what leaves the range is Inf
there and nowhere else."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch

from comfyui_nibble.kernels import fp16
from comfyui_nibble.kernels.dispatch import choose, quant_linear
from comfyui_nibble.kernels.fp16 import HALF, balanced, balanced_parts, row_power
from comfyui_nibble.kernels.operator.spec import ActivationSpec, WeightSpec
from comfyui_nibble.kernels.quant_linear import eager, naive
from comfyui_nibble.kernels.target import interpreter
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.problem import Problem
from comfyui_nibble.quant_core.layer.statistics import InputStatistics, hessian_blocks
from comfyui_nibble.quant_core.methods import METHODS, fit_problem
from comfyui_nibble.tests.codes import taken
from comfyui_nibble.tests.kernels.layers import (
    CHANNEL,
    TOKEN,
    UNSIGNED,
    kernels_codes,
    random_tensors,
    side_by_side,
    with_branches,
)
from comfyui_nibble.tests.support import outlier_tokens

K, N, TOKENS, LARGEST = 256, 96, 32, 65504.0
# Of a finite output against float32 on the same codes: roundings of y, of the low rank, and of scales where
# kernels rotate in bf16.
LIMIT = 2e-3
PATHS = {"eager": None, "interpreter": interpreter()}
KINDS = {
    "plain": (Part(0, K),),
    "after GELU": (Part(0, K, True),),
    "two parts": (Part(0, 64), Part(64, K, True)),
    "weight-only": (Part(0, K),),
}
LAYERS = [(method, kind) for method in METHODS for kind in KINDS]


@cache
def fitted(method, kind):
    """(full-precision weight and bias, the layer), fp16, at activations of about 1 with outliers of 40."""
    g, parts, weight_only = torch.Generator().manual_seed(1), KINDS[kind], kind == "weight-only"
    layer = Layer("b.0.l", "b.0", K, N, parts, "b.0.l", weight_only=weight_only)
    tokens = lambda count, seed: torch.cat(
        [outlier_tokens(count, p.stop - p.start, seed, p.after_gelu) for p in parts], 1
    )
    statistics = InputStatistics.empty("b.0.l", K, hessian_blocks([(p.start, p.stop) for p in parts], 3072))
    statistics.update(tokens(2048, 0))
    statistics.hold_out(tokens(512, 9), torch.rand(512, dtype=torch.float64, generator=g), 0.5)
    weight, bias = (torch.randn(N, K, generator=g) / K**0.5).half(), torch.randn(N, generator=g).half()
    chosen = METHODS[method]
    return weight, bias, fit_problem(Problem(layer, weight, bias, statistics), chosen, chosen.config).layer


def large(kind):
    """x (TOKENS, K) fp16: "dense" up to 2e4 or 6e4, 6e4 in one channel of 64, or "all" channels at 6e4 with
    any signs."""
    g = torch.Generator().manual_seed(5)
    if kind == "one channel of 64":
        x = torch.randn(TOKENS, K, generator=g)
        x[:, ::64] *= 6e4 / x[:, ::64].abs().amax()
        return x.half()
    if kind == "all at 6e4":
        return (6e4 * torch.randn(TOKENS, K, generator=g).sign()).half()
    return ((2 * torch.rand(TOKENS, K, generator=g) - 1) * float(kind.split()[-1])).half()


def outputs(x, layer, path, lora=()):
    """(y in fp16, float32's on the same codes): kernels rotate and transform in another order than torch, so
    that a few codes differ."""
    if path == "eager":
        return with_branches(x, layer.spec, layer.tensors, lora), naive.quant_linear(
            x, layer.spec, layer.tensors, lora
        )
    with kernels_codes() as codes:
        y = with_branches(x, layer.spec, layer.tensors, lora, target=PATHS[path])
    with taken(codes) if codes.calls else nullcontext():
        return y, naive.quant_linear(x, layer.spec, layer.tensors, lora)


def check(y, want) -> float:
    """y is fp16's version of want: finite within LIMIT, Inf where want is beyond fp16's range. Returns by how
    much one value may be off."""
    margin = 8 * LIMIT * float(want.square().mean().sqrt())
    assert not y.isnan().any()
    inf = y.isinf()
    assert (want.abs()[inf] > LARGEST - margin).all()
    assert (want.abs()[~inf] < LARGEST + margin).all()
    assert float((y.float() - want)[~inf].norm() / want[~inf].norm()) < LIMIT
    return margin


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("x", ["dense 2e4", "dense 6e4", "one channel of 64", "all at 6e4"])
@pytest.mark.parametrize(("method", "kind"), LAYERS)
def test_large_activations(method, kind, x, path):
    weight, bias, layer = fitted(method, kind)
    x = large(x)
    y, want = outputs(x, layer, path)
    margin = check(y, want)
    # Against full precision: Inf there, or within the layer's error of it.
    exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    error = (want - exact).abs().max()
    assert (exact.abs()[y.isinf()] > LARGEST - error - margin).all()


def test_the_cases_leave_the_range_of_fp16():
    """Else the tests above would ask for nothing: without the powers of two each of these is Inf or NaN."""
    weight, bias, layer = fitted("svdquant", "after GELU")
    full = torch.nn.functional.linear(large("all at 6e4"), weight, bias)
    assert 0.1 < float(full.isinf().float().mean()) < 0.4
    assert torch.isfinite(torch.nn.functional.linear(large("dense 6e4"), weight, bias)).float().mean() > 0.9
    assert (large("all at 6e4") @ layer.tensors["proj_down"].half()).isinf().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first", [0, 16])
def test_lora_beside_a_layer(path, first):
    """Columns of a LoRA's down that sum far above 1."""
    _, _, layer = fitted("svdquant", "plain")
    g = torch.Generator().manual_seed(2)
    lora = [
        (
            (30 * torch.randn(8, K, generator=g)).half(),
            (1e-3 * torch.randn(N - first, 8, generator=g)).half(),
            first,
        )
    ]
    x = large("dense 2e4")
    assert (x @ lora[0][0].T).isinf().any()
    check(*outputs(x, layer, path, lora))


@pytest.mark.parametrize("path", PATHS)
def test_sums_that_leave_the_range_on_their_way(path):
    """Two slices of other kinds, two launches of the kernels, whose products cancel."""
    spec = side_by_side(N, (128, TOKEN, CHANNEL), (128, ActivationSpec(bits=8), WeightSpec()), bias=False)
    tensors = random_tensors(spec, seed=3, codes=1)
    tensors["weight_scale"] = torch.ones_like(tensors["weight_scale"])
    x = torch.full((TOKENS, 256), 1000.0, dtype=HALF)
    x[:, 128:] *= -1
    x[:, 0] = 1001.0
    assert (x[:, :128].float().sum(1) > 1.9 * LARGEST).all()
    y = quant_linear(x, spec, tensors, target=PATHS[path])
    want = naive.quant_linear(x, spec, tensors)
    assert torch.isfinite(y).all()
    assert float((y.float() - want).abs().max()) <= 128.0  # a step of fp16 at the two products, 1.3e5, is 128


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [0, 8])
def test_a_transform_that_torch_applies(path, rank):
    """Scales of groups, which the quantizer does not take behind a learned transform: x is some 64 times as
    large behind it."""
    spec = side_by_side(
        N,
        (128, ActivationSpec(), WeightSpec()),
        (128, ActivationSpec(), WeightSpec()),
        kronecker=(8, 8),
        rank=rank,
    )
    tensors = random_tensors(spec, seed=4)
    tensors["weight_scale"] = tensors["weight_scale"] * 1e-4
    if rank:
        tensors["proj_up"] = tensors["proj_up"] * 1e-3
    x = large("dense 2e4")
    layer = QuantizedLayer("l", spec, tensors)
    assert str(choose(spec, interpreter())).count("transform in the quantizer") == 1
    check(*outputs(x, layer, path))
    lora = [
        (
            (30 * torch.randn(8, K, generator=torch.Generator().manual_seed(2))).half(),
            torch.full((N, 8), 1e-3).half(),
            0,
        )
    ]
    check(*outputs(x, layer, path, lora))


def test_small_activations_are_as_they_were(monkeypatch):
    """Up to 256 every power is 1: the same bits as without any."""
    for method in ("rtn", "convrot", "native"):
        _, _, layer = fitted(method, "plain")
        x = (large("dense 2e4").float() / 100).half()
        y = quant_linear(x, layer.spec, layer.tensors)
        with monkeypatch.context() as m:
            m.setattr(eager, "row_power", lambda *largest: torch.ones(TOKENS, 1))
            assert torch.equal(y, quant_linear(x, layer.spec, layer.tensors))


@pytest.mark.parametrize(
    "spec",
    [
        side_by_side(N, (256, TOKEN, CHANNEL), rank=8),
        side_by_side(N, (256, UNSIGNED, WeightSpec()), smooth=True),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(spec, value):
    tensors = random_tensors(spec)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).half()
    clean = quant_linear(x, spec, tensors)
    x[2, 70] = value
    y = quant_linear(x, spec, tensors)
    assert not torch.isfinite(y[2]).any()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])


def test_row_powers():
    found = row_power(
        torch.tensor([[0.0, 256.0], [257.0, 1.0], [0.0, 1e-9], [1e9, torch.nan]]),
        torch.tensor([[1.0], [1.0], [513.0], [1.0]]),
    )
    assert found[:3].flatten().tolist() == [1.0, 2.0, 4.0]
    assert found[3].isnan()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_a_balanced_branch_is_the_same_branch(scale):
    g = torch.Generator().manual_seed(0)
    down, up = scale * torch.randn(320, 16, generator=g), torch.randn(48, 16, generator=g)
    d, u = balanced(down.bfloat16(), up.bfloat16())
    assert d.dtype == u.dtype == HALF
    want = down.bfloat16().double() @ up.bfloat16().double().T
    assert float((d.double() @ u.double().T - want).norm() / want.norm()) < 2e-4
    if scale < 100:  # else 2^-12 is not enough
        assert torch.isfinite(torch.full((1, 320), LARGEST).half() @ d.abs()).all()
    assert not torch.isfinite(torch.full((1, 320), LARGEST).half() @ down.half().abs()).any() or scale < 1


def test_up_never_overflows():
    d, u = balanced(torch.full((64, 2), 1e3), torch.tensor([[6e4, 2.0**-10]]))
    assert u.tolist() == [[6e4, 4.0]]
    assert torch.equal(d, torch.tensor([[1e3, 1e3 / 4096]]).half().expand(64, 2))


def test_powers_are_kept_until_a_tensor_changes(monkeypatch):
    spec = side_by_side(N, (128, TOKEN, CHANNEL), (128, TOKEN, CHANNEL), rank=4)
    tensors, calls, real = random_tensors(spec), [], fp16._factor
    monkeypatch.setattr(fp16, "_factor", lambda *args: calls.append(1) or real(*args))
    first = balanced_parts(spec, tensors)
    assert all(map(torch.equal, balanced_parts(spec, tensors), first))
    assert len(calls) == 2  # one a part
    tensors["proj_down"].mul_(1000)
    second = balanced_parts(spec, tensors)
    assert len(calls) == 4
    assert not torch.equal(first[1], second[1])
    balanced_parts(spec, tensors | {"proj_up": tensors["proj_up"].clone()})
    assert len(calls) == 6
    with torch.inference_mode():
        unversioned = {k: t.clone() for k, t in tensors.items()}
        balanced_parts(replace(spec), unversioned)
        balanced_parts(replace(spec), unversioned)
    assert len(calls) == 10


def test_torch_compile_takes_the_eager_path_in_one_graph():
    _, _, layer = fitted("svdquant", "two parts")
    run = torch.compile(
        lambda x: eager.quant_linear(x, layer.spec, layer.tensors), backend="eager", fullgraph=True
    )
    assert torch.equal(run(large("dense 6e4")), quant_linear(large("dense 6e4"), layer.spec, layer.tensors))
