"""Layers put together: their outputs are the outputs of the parts, side by side or summed."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.operator.packing import pack
from comfyui_nibble.kernels.operator.quantizers import absmax_scale, quantize
from comfyui_nibble.kernels.operator.spec import GELU_SHIFT, ActivationSpec, LinearSpec, PartSpec, SpecError
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.stack import (
    exact_sum,
    resmooth,
    rows_spec,
    split_columns,
    stack_columns,
    stack_rows,
)
from comfyui_nibble.tests.support import relative_error, sqnr_db

K = 128


def random(name, n, widths=(K,), rank=8, seed=0, bias=True, smooth=True, shifted=(), dtype=torch.bfloat16):
    """A layer of random tensors; shifted: parts with unsigned activations."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    parts, at = [], 0
    for i, width in enumerate(widths):
        act = ActivationSpec(unsigned=True, shift=GELU_SHIFT) if i in shifted else ActivationSpec()
        parts.append(PartSpec(at, at + width, activation=act, smooth=smooth, rank=rank))
        at += width
    tensors = {
        "weight": pack(torch.randint(-7, 8, (n, at), generator=g), 4),
        "weight_scale": (randn(at // 64, n).abs() * 0.1 + 0.01).to(dtype),
    }
    if smooth:
        tensors["smooth_factor"] = (0.5 + torch.rand(at, generator=g)).to(dtype)
    if rank:
        tensors |= {"proj_down": randn(at, rank).to(dtype), "proj_up": randn(n, rank * len(widths)).to(dtype)}
    if bias:
        tensors["bias"] = randn(n).to(dtype)
    return QuantizedLayer(name, LinearSpec(at, n, tuple(parts), bias), tensors)


def with_tensors(layer, **tensors):
    return QuantizedLayer(layer.name, layer.spec, layer.tensors | tensors)


def tokens(k):
    return torch.randn(16, k, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("widths", [(K,), (K, 256)])
def test_rows_with_low_ranks_of_their_own(widths):
    a, b, c = (
        random(name, n, widths, rank, seed)
        for seed, (name, n, rank) in enumerate([("a", 64, 8), ("b", 32, 24), ("c", 16, 0)])
    )
    smooth = a.tensors["smooth_factor"]
    b, c = with_tensors(b, smooth_factor=smooth), with_tensors(c, smooth_factor=smooth)
    joined, x = stack_rows("abc", [a, b, c]), tokens(sum(widths))
    assert joined.spec == rows_spec("abc", [a.spec, b.spec, c.spec])
    assert (joined.name, joined.spec.out_features, joined.spec.rank) == ("abc", 112, 32)
    assert relative_error(torch.cat([a(x), b(x), c(x)], 1), joined(x)) < 1e-6
    assert (
        relative_error(torch.cat([a.dequantize(), b.dequantize(), c.dequantize()]), joined.dequantize())
        < 1e-6
    )


def test_rows_with_one_low_rank_come_back_together():
    whole = random("whole", 96)
    parts = whole.split_rows(["q", "k", "v"], [32, 48, 16])
    again = stack_rows("whole", parts, share=True)
    assert again.spec == whole.spec
    assert all(torch.equal(again.tensors[k], t) for k, t in whole.tensors.items())
    with pytest.raises(SpecError, match="layer whole: the rows of q, other differ in proj_down"):
        stack_rows(
            "whole",
            [
                parts[0],
                with_tensors(random("other", 32, seed=4), smooth_factor=whole.tensors["smooth_factor"]),
            ],
            share=True,
        )


def test_a_bias_of_some_rows_only():
    a, b = random("a", 32, rank=0), random("b", 32, rank=0, bias=False)
    b = with_tensors(b, smooth_factor=a.tensors["smooth_factor"])
    assert torch.equal(
        stack_rows("ab", [a, b]).tensors["bias"], torch.cat([a.tensors["bias"], torch.zeros(32).bfloat16()])
    )


def test_rows_that_cannot_be_one_layer():
    a = random("a", 32)
    with pytest.raises(SpecError, match="layer ab: the rows of a, b differ in smooth_factor"):
        stack_rows("ab", [a, random("b", 32, seed=1)])
    for other in (
        random("b", 32, (256,)),
        random("b", 32, shifted=(0,)),
        random("b", 32, smooth=False),
        random("b", 32, (64, 64)),
    ):
        with pytest.raises(SpecError, match="layer ab: rows of layers that read x in different ways"):
            stack_rows("ab", [a, other])
    other = with_tensors(a, weight_scale=a.tensors["weight_scale"].half())
    with pytest.raises(
        SpecError, match=r"layer ab: weight_scale has the dtypes torch\.bfloat16, torch\.float16"
    ):
        stack_rows("ab", [a, other])


@pytest.mark.parametrize("ranks", [(8, 24), (0, 8), (0, 0)])
def test_columns(ranks):
    a, b = (
        random("a", 48, (K,), ranks[0]),
        random("b", 48, (256,), ranks[1], seed=1, shifted=(0,), smooth=ranks[0] == 0),
    )
    joined, x = stack_columns("ab", [a, b]), tokens(K + 256)
    assert (joined.spec.in_features, joined.spec.rank, joined.spec.parts[1].start) == (K + 256, max(ranks), K)
    assert relative_error(a(x[:, :K]) + b(x[:, K:]), joined(x)) < 1e-6
    first, second = split_columns(joined, ["first", "second"])
    assert relative_error(a(x[:, :K]) - a.tensors["bias"], first(x[:, :K])) < 1e-6
    assert relative_error(joined(x), first(x[:, :K]) + second(x[:, K:])) < 1e-6
    assert (first.spec.bias, second.spec.bias, second.spec.parts[0].activation.shift) == (
        False,
        True,
        GELU_SHIFT,
    )
    assert torch.equal(second.tensors["bias"], joined.tensors["bias"])


def test_columns_that_cannot_be_one_layer():
    a = random("a", 48)
    with pytest.raises(
        SpecError,
        match="layer ab: columns of one layer need equally many out-channels and no order or padding of "
        "their own, found 48 and 32",
    ):
        stack_columns("ab", [a, random("b", 32)])
    ordered = QuantizedLayer(
        "b", replace(a.spec, order=True), a.tensors | {"channel_order": torch.arange(K).int()}
    )
    with pytest.raises(SpecError, match="found 48 and 48 with an order"):
        stack_columns("ab", [a, ordered])
    with pytest.raises(SpecError, match="layer a: 2 ranges of in-channels without order"):
        split_columns(a, ["x", "y"])


def test_sums_of_biases_are_exact():
    a, b = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([0.5, 0.0]).bfloat16()
    assert exact_sum([a]) is a
    assert exact_sum([a, b]).dtype == torch.bfloat16
    assert torch.equal(exact_sum([a, b]), torch.tensor([1.5, 2.0]).bfloat16())
    fine = torch.tensor([2.0**-12, 0.0]).bfloat16()
    assert torch.equal(exact_sum([a, fine]), torch.tensor([1 + 2.0**-12, 2.0]))


def test_another_smoothing():
    """A layer whose weight is exact behind one smoothing, quantized again behind another: the dB is that of
    the whole weight."""
    layer = random("a", 640)
    assert (
        relative_error(layer.dequantize(), resmooth(layer, layer.tensors["smooth_factor"])[0].dequantize())
        < 0.05
    )
    smooth = (
        layer.tensors["smooth_factor"]
        * (0.8 + 0.4 * torch.rand(K, generator=torch.Generator().manual_seed(2)))
    ).bfloat16()
    again, decibels = resmooth(layer, smooth)
    assert torch.equal(again.tensors["smooth_factor"], smooth)
    assert again.tensors["proj_down"] is layer.tensors["proj_down"]
    assert decibels == pytest.approx(sqnr_db(layer.dequantize(), again.dequantize()), abs=1e-3)
    plain = QuantizedLayer(
        "a",
        replace(layer.spec, parts=(replace(layer.spec.parts[0], rank=0),)),
        {k: t for k, t in layer.tensors.items() if "proj" not in k},
    )
    weight = plain.dequantize() * smooth.float()
    scale = absmax_scale(weight, 4, "group").bfloat16()
    nearest = quantize(weight, scale.float(), 4, "group").float().view(640, -1, 64) * scale.float()[..., None]
    by_absmax = sqnr_db(plain.dequantize(), nearest.view(640, K) / smooth.float())
    assert resmooth(plain, smooth)[1] > by_absmax + 0.1  # scales of least error


def test_what_takes_no_other_smoothing():
    for layer in (random("a", 32, smooth=False), random("a", 32, shifted=(0,)), random("a", 32, (64, 64))):
        with pytest.raises(
            SpecError, match="layer a: only plain smoothed layers of one part take another smoothing"
        ):
            resmooth(layer, torch.ones(layer.spec.in_features).bfloat16())
