"""The operator by torch's int8 product against the specification, and which layers take it."""

from pathlib import Path

import pytest
import torch

from comfyui_nibble.kernels import at_load, choose, paths_of, spec_at_load, target
from comfyui_nibble.kernels.dispatch import TORCH_INT8, quant_linear
from comfyui_nibble.kernels.operator.spec import ActivationSpec, WeightSpec
from comfyui_nibble.kernels.quant_linear import eager, torch_int8
from comfyui_nibble.kernels.target import Target, target_of
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.precisions import in_int8
from comfyui_nibble.tests.kernels.layers import (
    CHANNEL,
    TOKEN,
    UNSIGNED,
    inputs,
    random_tensors,
    side_by_side,
    spec_of,
)
from comfyui_nibble.tests.support import relative_error

CPU, OLD = Target("cpu", "int8"), Target("cpu")
NO_TRITON = Target("cuda", 89, trouble="Triton cannot run here")
EIGHT = WeightSpec(8, "channel")
SPECS = {
    "W4A4": spec_of(192, 80, TOKEN, CHANNEL, rank=8),
    "W8A8": spec_of(192, 80, ActivationSpec(8, "token"), EIGHT, rank=8),
    "W2A4": spec_of(192, 80, TOKEN, WeightSpec(2, "channel")),
    "W8A1": spec_of(192, 80, ActivationSpec(1, "token"), EIGHT),
    "unsigned": spec_of(192, 80, ActivationSpec(4, "token", unsigned=True, shift=0.17), CHANNEL),
    "rotated": spec_of(256, 80, TOKEN, CHANNEL, rotation=64),
    "slices": side_by_side(80, (64, TOKEN, CHANNEL), (128, ActivationSpec(8, "token"), EIGHT)),
    "W8A16": spec_of(192, 80, None, EIGHT, rank=8),
    "W4A16": spec_of(192, 80, None, CHANNEL),
}


@pytest.fixture(autouse=True)
def sums(monkeypatch):
    """On a processor without such instructions the sums are made by other means, as exactly."""
    monkeypatch.delenv(at_load.SWITCH, raising=False)
    if not target_of("cpu").arch:
        by_float = lambda a, b: (a.double() @ b.double()).int()
        monkeypatch.setattr(torch, "_int_mm", by_float)


@pytest.mark.quick
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_is_the_operator(name, rows):
    """On fp32 tensors nothing but the codes is rounded to less."""
    spec = SPECS[name]
    tensors = {k: t.float() if t.is_floating_point() else t for k, t in random_tensors(spec).items()}
    x = inputs(rows, spec.in_features).float()
    found, want = torch_int8.quant_linear(x, spec, tensors), eager.quant_linear(x, spec, tensors)
    assert found.dtype == torch.float32
    assert relative_error(want, found) < 1e-6


@pytest.mark.parametrize("dtype", torch_int8.DTYPES)
def test_dtypes_and_chunks(dtype, monkeypatch):
    spec = SPECS["slices"]
    tensors, x = random_tensors(spec), inputs(300, 192).to(dtype)
    whole = torch_int8.quant_linear(x, spec, tensors)
    assert whole.dtype == dtype
    exact = torch_int8.quant_linear(x.float(), spec, tensors)
    assert torch.equal(whole, exact.to(dtype))
    monkeypatch.setattr(torch_int8, "ROWS", 7)
    monkeypatch.setattr(torch_int8, "CHANNELS", 33)
    assert relative_error(whole, torch_int8.quant_linear(x, spec, tensors)) < 1e-6


def test_fp16_overflows_only_where_the_result_does():
    spec = SPECS["W4A4"]
    tensors = random_tensors(spec)
    x = inputs(9, 192)
    x[3] = 6e4
    found = torch_int8.quant_linear(x.half(), spec, tensors)
    want = torch_int8.quant_linear(x.half().double().float(), spec, tensors)
    assert torch.equal(found.isinf(), want.abs() > 65519)


def test_nan_stays_in_its_token():
    for name in ("W4A4", "W8A16"):
        spec = SPECS[name]
        x = inputs(4, 192).float()
        x[2, 7] = torch.nan
        y = torch_int8.quant_linear(x, spec, random_tensors(spec))
        assert y.isnan().all(1).tolist() == [False, False, True, False]
        assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.quick
def test_which_layers_take_it():
    group, channel = spec_of(192, 48, rank=8), SPECS["W4A4"]
    assert choose(channel, CPU).path == TORCH_INT8
    assert str(choose(channel, CPU)) == f"{TORCH_INT8}; triton: needs a GPU"
    assert str(choose(group, CPU)) == f"eager; triton: needs a GPU; {TORCH_INT8}: scales of groups"
    assert str(choose(channel, OLD)) == (
        f"eager; triton: needs a GPU; {TORCH_INT8}: needs x86 with VNNI or AMX, where torch's int8 product "
        "is exact"
    )
    assert choose(channel, NO_TRITON).path == TORCH_INT8
    assert choose(spec_of(192, 44, TOKEN, CHANNEL), NO_TRITON).refused[-1] == (
        TORCH_INT8,
        "44 channels, not a multiple of 8",
    )
    # Where Triton runs, its paths are the only ones: nobody has timed this one there.
    odd = spec_of(512, 48, TOKEN, CHANNEL, rotation=512)
    assert choose(odd, Target("cuda", 89, (3, 6))).path == "eager"
    assert choose(spec_of(192, 48, ActivationSpec(8, "token", unsigned=True), CHANNEL), CPU).path == "eager"


@pytest.mark.quick
def test_form_at_load(monkeypatch):
    of = lambda spec, target=CPU: spec_at_load(spec, target)
    group = spec_of(192, 48, UNSIGNED, rank=8)
    assert of(group).precision == "W8A8"
    assert of(SPECS["W4A4"]).precision == "W8A4"
    assert of(SPECS["W2A4"]).precision == "W8A4"
    assert of(spec_of(192, 48, None)).precision == "W8A16"
    for kept in (SPECS["W8A8"], spec_of(192, 48, ActivationSpec(granularity="tensor"), CHANNEL)):
        assert of(kept) is kept
    for spec in (group, SPECS["W4A4"]):
        assert of(spec, OLD) is spec
        assert of(spec, Target("cuda", 89, (3, 6))) is spec
    monkeypatch.setenv(at_load.SWITCH, "0")
    assert of(group) is group
    monkeypatch.delenv(at_load.SWITCH)
    paths, lines = paths_of({"a": group, "b": SPECS["W8A8"]}, CPU)
    assert paths == {"a": f"{TORCH_INT8} as W8A8", "b": TORCH_INT8}
    assert lines[1] == f"  1 layer: {TORCH_INT8} as W8A8; triton: needs a GPU"


@pytest.mark.parametrize("name", ["W4A4", "W2A4", "slices", "W4A16"])
def test_codes_of_one_scale_a_row_keep_their_values(name):
    spec = SPECS[name]
    layer = QuantizedLayer("x", spec, random_tensors(spec))
    eight = in_int8(layer)
    assert eight.spec == spec.as_int8()
    assert torch.equal(eight.dequantize(), layer.dequantize())
    x = inputs(9, 192).float()
    assert relative_error(eager.quant_linear(x, spec, layer.tensors), eight(x)) < 1e-6


def test_dispatch_takes_it_on_this_machine():
    """And leaves it where gradients are asked for, which codes have none of."""
    if not target_of("cpu").arch:
        assert choose(SPECS["W4A4"], "cpu").path == "eager"
        return
    spec = SPECS["W4A4"]
    tensors, x = random_tensors(spec), inputs(9, 192).float()
    assert torch.equal(quant_linear(x, spec, tensors), torch_int8.quant_linear(x, spec, tensors))
    x.requires_grad_(True)
    y = quant_linear(x, spec, tensors)
    assert torch.equal(y, eager.quant_linear(x, spec, tensors))
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_compiled_it_is_one_graph():
    spec = SPECS["slices"]
    tensors, x = random_tensors(spec), inputs(300, 192).float()
    call = torch.compile(lambda x: quant_linear(x, spec, tensors), backend="eager", fullgraph=True)
    assert relative_error(quant_linear(x, spec, tensors), call(x)) < 1e-6


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="only Linux says what a CPU has")
@pytest.mark.parametrize(
    ("flags", "taken"), [("sse2 avx2", ""), ("avx2 avx_vnni", "int8"), ("amx_int8", "int8")]
)
def test_only_processors_with_such_instructions(monkeypatch, flags, taken):
    """Others may have the sums right and take ten times as long."""
    monkeypatch.setattr(target.Path, "read_text", lambda path: f"flags\t: fpu {flags}\n")
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int())
    target._multiplies_int8.cache_clear()
    try:
        assert target_of("cpu").arch == (taken if torch.backends.mkldnn.is_available() else "")
    finally:
        target._multiplies_int8.cache_clear()
