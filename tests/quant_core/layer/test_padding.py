"""In-channels that do not fill a group of 64: all that is done with such a layer equals the same done with
explicit columns of zeros."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from comfyui_nibble.kernels.dispatch import quant_linear
from comfyui_nibble.kernels.lora import with_lora
from comfyui_nibble.kernels.operator.spec import SpecError
from comfyui_nibble.kernels.operator.text import parse
from comfyui_nibble.kernels.prologue import Gelu, LayerNormModulate
from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.kernels.target import interpreter
from comfyui_nibble.quant_core.calibration.plan import inputs_of
from comfyui_nibble.quant_core.convert.replace import becomes, dense, replaced
from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.formats.kitchen import native
from comfyui_nibble.quant_core.formats.kitchen import write as kitchen_out
from comfyui_nibble.quant_core.formats.nibble import PackFile, save
from comfyui_nibble.quant_core.formats.nunchaku.targets import losses as nunchaku_losses
from comfyui_nibble.quant_core.formats.spec_json import from_json, to_json
from comfyui_nibble.quant_core.layer.adapters import Kronecker, LowRank, Side
from comfyui_nibble.quant_core.layer.bake import bake
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer, QuantLinear
from comfyui_nibble.quant_core.layer.precisions import in_int8, w4a8, w8a8
from comfyui_nibble.quant_core.layer.problem import Problem, output_sqnr
from comfyui_nibble.quant_core.layer.stack import columns_spec, split_columns, stack_rows
from comfyui_nibble.quant_core.layer.statistics import InputStatistics
from comfyui_nibble.quant_core.methods import METHODS, fit_problem
from comfyui_nibble.quant_core.run.layers import not_quantizable
from comfyui_nibble.quant_core.training.rounding import round_again
from comfyui_nibble.quant_core.training.student import Student
from comfyui_nibble.tests.kernels.layers import with_branches
from comfyui_nibble.tests.support import outlier_tokens, relative_error

N, K, WHOLE = 97, 200, 256  # 97: out-channels need no multiple of anything
FITS = {
    "svdquant": {"rank": 8}, "svdquant_r": {"rank": 8}, "splitquant": {},
    "splitquant_4": {"slices": 2, "least": 64},
    "splitquant_4 by slice": {"slices": 2, "least": 64, "scales": "slice"},
    "splitquant_4 sorted": {"slices": 2, "least": 64, "sort": True}, "convrot": {}, "rtn": {},
    "robuq": {"rank": 8}, "robuq A1": {"rank": 0, "activation_bits": 1},
}  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def zeros_behind(problem: Problem) -> Problem:
    """The same layer as if the model itself had columns of zeros, calibrated on inputs with zeros."""
    layer = replace(
        problem.layer,
        in_features=WHOLE,
        parts=(*problem.layer.parts[:-1], replace(problem.layer.parts[-1], stop=WHOLE)),
    )
    stats = None
    if problem.statistics is not None:
        stats = InputStatistics.empty(
            layer.input, WHOLE, tuple((a, WHOLE if b == K else b) for a, b in problem.statistics.blocks)
        )
        tokens = [
            outlier_tokens(1024, p.stop - p.start, 1000 + i, p.after_gelu)
            for i, p in enumerate(problem.layer.parts)
        ]
        stats.update(pad(torch.cat(tokens, 1), (0, WHOLE - K)))
        stats.hold_out(pad(problem.statistics.tokens, (0, WHOLE - K)), problem.statistics.keys, 0.5)
        for block, moments in problem.statistics.padded(WHOLE - K).hessians.items():
            # Sums in another order, which a fit must not see.
            torch.testing.assert_close(stats.hessians[block], moments, rtol=1e-4, atol=1e-2)
            stats.hessians[block] = moments
    return Problem(layer, pad(problem.weight, (0, WHOLE - K)), problem.bias, stats)


def fitted(problem, name):
    method = METHODS[name.split()[0]]
    return fit_problem(problem, method, method.configured(**FITS[name])).layer


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "data-free"])
@pytest.mark.parametrize("name", FITS)
def test_methods_fit_as_with_columns_of_zeros(make_problem, name, calibrated):
    make = lambda: make_problem(N, K, calibrated=calibrated, fit_tokens=1024)
    layer, want = fitted(make().filled(), name), fitted(zeros_behind(make()), name)
    assert (layer.spec.in_features, layer.spec.padding) == (K, WHOLE - K)
    assert layer.spec.without_padding() == want.spec
    assert all(torch.equal(t, want.tensors[k]) for k, t in layer.tensors.items())
    x = outlier_tokens(9, K, 5)
    assert torch.equal(layer(x), want(pad(x, (0, WHOLE - K))))
    assert torch.equal(layer.dequantize(), want.dequantize()[:, :K])
    assert layer.dequantize().shape == (N, K)


@pytest.mark.parametrize("weight_only", [False, True])
def test_parts_and_weight_only_layers(make_problem, weight_only):
    """Two parts, the second with shifted codes, and W4A16: GELU's shift meets zeros, and the bias takes back
    nothing for them."""
    parts = None if weight_only else (Part(0, 64), Part(64, K, after_gelu=True))

    def fit(zeros):
        problem = make_problem(N, K, parts=parts, fit_tokens=1024)
        problem = zeros(replace(problem, layer=replace(problem.layer, weight_only=weight_only)))
        return fit_problem(
            problem, METHODS["svdquant"], METHODS["svdquant"].configured(rank=8, gptq=False)
        ).layer

    layer, want = fit(Problem.filled), fit(zeros_behind)
    assert all(torch.equal(t, want.tensors[k]) for k, t in layer.tensors.items())
    x = randn(9, K)
    assert torch.equal(layer(x), want(pad(x, (0, WHOLE - K))))


def test_quality_is_that_of_a_whole_width(make_problem):
    """Zeros cost nothing but their bytes: within 1 dB of layers 8 channels narrower and 56 wider, which need
    none."""
    db = {
        k: output_sqnr(p := make_problem(N, k, fit_tokens=1024).filled(), fitted(p, "svdquant"))
        for k in (192, K, WHOLE)
    }
    assert abs(db[K] - (db[192] + db[WHOLE]) / 2) < 1


# -- one layer, everywhere


@pytest.fixture
def problem(make_problem):
    return make_problem(N, K, fit_tokens=1024).filled()


@pytest.fixture
def layer(problem):
    """Smoothing, groups of 64 and a low rank."""
    return (
        METHODS["svdquant"]
        .fit(problem, METHODS["svdquant"].configured(rank=16, gptq=False, iterations=0))
        .layer
    )


@pytest.fixture
def plain(layer):
    """The same layer of x that comes with zeros."""
    return QuantizedLayer("plain", layer.spec.without_padding(), layer.tensors)


def test_every_path_pads_x_alone(layer, plain):
    """Adapters' matrices are over the raw x. A GELU keeps zeros, a LayerNorm is of the raw x alone."""
    x, added = randn(7, K), [(randn(4, K), randn(32, 4), 16)]
    wide, zeros = (
        pad(x, (0, WHOLE - K)),
        [(pad(down, (0, WHOLE - K)), up, first) for down, up, first in added],
    )
    for run in (naive.quant_linear, quant_linear):
        torch.testing.assert_close(
            run(x, *with_lora(layer.spec, layer.tensors, added, x.dtype)),
            run(wide, *with_lora(plain.spec, plain.tensors, zeros, x.dtype)),
            rtol=1e-5,
            atol=1e-5,
        )
    modulated = LayerNormModulate(randn(1, K), randn(1, K, seed=1))
    got = quant_linear(x[None], layer.spec, layer.tensors, prologue=modulated)
    assert torch.equal(got[0], plain(pad(modulated(x), (0, WHOLE - K))))
    got = quant_linear(x[None], layer.spec, layer.tensors, prologue=Gelu())
    assert torch.equal(got[0], quant_linear(wide, plain.spec, plain.tensors, prologue=Gelu()))
    with pytest.raises(ValueError, match=f"the layer has {K} in-channels, x has the shape"):
        layer(wide)


@pytest.mark.parametrize("before", [None, Gelu(), "norm"], ids=["alone", "gelu", "norm"])
@pytest.mark.parametrize("name", FITS)
def test_kernels(make_problem, name, before):
    """Triton's kernels on each method's layer, against the same kernels on x with zeros."""
    layer = fitted(make_problem(N, K, calibrated=False).filled(), name)
    x, down, up = randn(5, K).half(), randn(4, K).half() * 0.1, randn(32, 4).half()
    before = LayerNormModulate(randn(1, K).half(), randn(1, K, seed=1).half()) if before == "norm" else before
    got = with_branches(x, layer.spec, layer.tensors, [(down, up, 16)], before, interpreter())
    if isinstance(before, LayerNormModulate):
        x, before = before(x), None
    wide, added = pad(x, (0, WHOLE - K)), [(pad(down, (0, WHOLE - K)), up, 16)]
    assert torch.equal(
        got,
        with_branches(wide, layer.spec.without_padding(), layer.tensors, added, before, interpreter()),
    )


def test_rows_devices_and_modules(layer):
    x = randn(5, K)
    pieces = layer.split_rows(["q", "k"], [32, 65])
    torch.testing.assert_close(torch.cat([p(x) for p in pieces], 1), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(stack_rows("qk", pieces, share=True).dequantize(), layer.dequantize())
    module = QuantLinear(layer)
    assert torch.equal(module(x), layer(x))
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), layer(x))
    with pytest.raises(SpecError, match="no order or padding of their own, found 97 and 97 with padding"):
        columns_spec("both", [layer.spec, layer.spec])
    with pytest.raises(
        SpecError, match="without order, padding or learned transform, found .*padded to 256 channels"
    ):
        split_columns(layer, ["one"])


def test_other_precisions(layer, plain, problem):
    x = randn(5, K)
    for other in (w4a8, in_int8):
        assert torch.equal(other(layer)(x), other(plain)(pad(x, (0, WHOLE - K))))
    raised = w8a8(problem, layer)
    assert raised.spec.padding == WHOLE - K
    assert relative_error(problem.original.float(), raised.dequantize()) < 0.01
    assert problem.original.shape == (N, K)


def test_training_starts_from_the_layer(problem):
    """A student computes what its start does, and gives it back; GPTQ rounds it again."""
    start = METHODS["rtn"].fit(problem, METHODS["rtn"].config).layer
    student, x = Student(problem, start, ("scale",)), randn(5, K)
    with torch.no_grad():
        assert relative_error(start(x), student(x)) < 1e-5
    again = student.layer()
    assert again.spec == start.spec
    assert torch.equal(again.tensors["weight"], start.tensors["weight"])
    rounded = round_again(problem, start)
    assert rounded.spec == start.spec
    assert output_sqnr(problem, rounded) > output_sqnr(problem, start)


def test_sides_are_of_the_raw_x(layer):
    """LoRA, LoKr and dense differences beside W, merged into the branch and baked, whole and cut down."""
    x, pair = randn(5, K), LowRank(randn(4, K) * 0.1, randn(N, 4))
    side = Side(N, K, low_rank=[pair])
    spec, changed = side.merged(layer, torch.float32)
    got = QuantizedLayer("", spec, layer.tensors | changed)(x) - layer(x)
    assert relative_error(x @ pair.down.T @ pair.up.T, got) < 1e-4
    assert relative_error(side.weight(layer.dequantize()), bake(layer, side).layer.dequantize()) < 4e-3
    side.add_dense(randn(N, K) * 0.01)
    whole = Side(
        N,
        WHOLE,
        low_rank=[LowRank(pad(pair.down, (0, WHOLE - K)), pair.up)],
        dense=pad(side.dense, (0, WHOLE - K)),
    )
    unpadded = QuantizedLayer("", layer.spec.without_padding(), layer.tensors)
    assert abs(bake(layer, side, rank=24).error - bake(unpadded, whole, rank=24).error) < 1e-4
    lokr = Side(N, K, kronecker=[Kronecker(randn(1, 8), randn(N, 25))])
    assert lokr.weight(layer.dequantize()).shape == (N, K)


def test_description(layer, plain):
    """Where there is no padding a description is the one that older versions wrote and read."""
    assert "padding" not in to_json(plain.spec)
    assert from_json(json.loads(json.dumps(to_json(layer.spec)))) == layer.spec == parse(layer.spec.text)
    assert layer.spec.text != plain.spec.text
    assert layer.spec.describe().endswith("padded to 256 channels")
    assert layer.spec.shapes()["proj_down"] == (WHOLE, 16)
    with pytest.raises(SpecError, match="parts end at channel 256, the layer has 200 and 55 of padding"):
        replace(layer.spec, padding=55)
    with pytest.raises(SpecError, match="padding cannot be negative"):
        replace(plain.spec, in_features=300, padding=-44)


@pytest.mark.parametrize("base3", [False, True])
def test_file(tmp_path, make_problem, base3):
    layer = fitted(make_problem(N, K, calibrated=False).filled(), "robuq")
    path = tmp_path / "model.safetensors"
    save(path, {"x": layer}, {}, "generic", {}, [], base3)
    found = PackFile(path)
    assert found.logical_shapes()["x.weight"] == (N, K)
    assert found.base3 == ({"x"} if base3 else set())
    read = found.layer("x")
    assert read.spec == layer.spec
    assert all(torch.equal(t, read.tensors[k]) for k, t in layer.tensors.items())


def test_other_formats_refuse_by_name(layer, problem):
    """None of them pads x. Layers become int8 where that takes their in-channels (16 divides them), else 16
    bit."""
    convrot = fitted(problem, "convrot")
    for found in (kitchen_out.losses, native.losses):
        assert found({"x": convrot.spec}) == {
            "x": "has in-channels padded from 200 to 256; comfy-kitchen's layers take x as it is"
        }
    name = "double_blocks.0.img_attn.qkv"
    assert (
        nunchaku_losses({name: layer.spec}, "flux")[name]
        == "pads its 200 in-channels to 256, which nunchaku does not"
    )
    assert becomes(layer.spec, "int8") == "16 bit"
    layers, rest = replaced({"x": layer}, {}, ["x"], "int8")
    assert layers == {}
    assert relative_error(dense(layer)[0], rest["x.weight"]) < 3e-3
    wider = QuantizedLayer("x", replace(layer.spec, in_features=208, padding=48), layer.tensors)
    made = replaced({"x": wider}, {}, ["x"], "int8")[0]["x"]
    assert native.format_of(made.spec) == ("int8_tensorwise", "")
    assert relative_error(wider.dequantize(), made.dequantize()) < 0.01


@pytest.mark.parametrize(
    ("k", "what"), [(200, "16 bit"), (208, "W8A8 per channel H16"), (256, "W4A4 per channel H256")]
)
def test_native_pads_nothing(make_problem, k, what):
    """What stock ComfyUI runs: 8 bits where 16 divides the in-channels, with the reason where nothing
    does."""
    found = fit_problem(
        make_problem(N, k, fit_tokens=1024).filled(),
        METHODS["native"],
        METHODS["native"].configured(quality_db=0),
    )
    if what == "16 bit":
        assert found.layer is None
        assert found.choices == {"K": "= 200 does not divide by 16, as stock ComfyUI's formats need"}
        return
    assert (found.layer.spec.describe(), found.layer.spec.padding) == (what, 0)
    assert native.losses({"x": found.layer.spec}) == {}
    assert found.layer(randn(3, k)).shape == (3, N)


def test_what_is_calibrated_and_what_is_left(make_problem):
    problem = make_problem(N, K, calibrated=False)
    (found,) = inputs_of([problem.layer])
    assert (found.width, found.blocks) == (K, ((0, K),))
    assert not_quantizable(problem.layer) == ""
    inner = replace(problem.layer, parts=(Part(0, 100), Part(100, K)))
    assert not_quantizable(inner) == "in-channels 0..100 do not divide by 64, and others follow them"
