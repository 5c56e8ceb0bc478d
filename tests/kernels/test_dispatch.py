"""Which path a layer takes and why, what is refused, and what torch.compile and the operators' checks make of
it."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels.dispatch import ROW_LIMIT, TORCH_INT8, choose, quant_linear, takes_components
from comfyui_nibble.kernels.lora import with_lora
from comfyui_nibble.kernels.operator.spec import ActivationSpec, WeightSpec
from comfyui_nibble.kernels.operator.text import parse
from comfyui_nibble.kernels.prologue import NOTHING, Gelu, LayerNormModulate
from comfyui_nibble.kernels.quant_linear import eager, op
from comfyui_nibble.kernels.target import Target, interpreter, kernel_target, target_of
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer, QuantLinear
from comfyui_nibble.tests.kernels.layers import (
    CHANNEL,
    TOKEN,
    UNSIGNED,
    inputs,
    random_tensors,
    side_by_side,
    spec_of,
)

HALF, BF16 = torch.float16, torch.bfloat16
TARGETS = {
    **{f"sm_{a}": Target("cuda", a, (3, 6)) for a in (75, 80, 89, 90, 100, 120)},
    **{a: Target("hip", a, (3, 6)) for a in ("gfx942", "gfx1100", "gfx1030")},
    "cpu": Target("cpu", triton=(3, 6)),
    "no triton": Target("cuda", 89),
    "triton 3.3": Target("cuda", 89, (3, 3)),
    "triton 3.5": Target("cuda", 89, (3, 5)),
    "no compiler": Target("cuda", 89, trouble="Triton cannot run here (RuntimeError: no C compiler)"),
    "H100": Target("cuda", 90, (3, 6), "NVIDIA H100"),
}
SPECS = {
    "W4A4": spec_of(192, 48, rank=8),
    "W4A4 unsigned": spec_of(192, 48, UNSIGNED),
    "W4A8": spec_of(192, 48, ActivationSpec(bits=8)),
    "W2A4": spec_of(192, 48, TOKEN, WeightSpec(2, "channel")),
    "W2A4 in groups": spec_of(192, 48, TOKEN, WeightSpec(2)),
    "W4": spec_of(192, 48, None),
    "W4 of 128": spec_of(256, 48, None, WeightSpec(group=128)),
    "groups of 32": spec_of(192, 48, ActivationSpec(group=32)),
    "per tensor": spec_of(192, 48, ActivationSpec(granularity="tensor"), CHANNEL),
    "unsigned 8 bit": spec_of(192, 48, ActivationSpec(bits=8, unsigned=True)),
    "H512": spec_of(512, 48, rotation=512),
    "100 channels": spec_of(100, 48, TOKEN, CHANNEL),
    "slices of 96": side_by_side(48, (96, TOKEN, CHANNEL), (96, TOKEN, CHANNEL)),
    "2-bit slice of 64": side_by_side(48, (64, TOKEN, WeightSpec(2, "channel")), (128, TOKEN, CHANNEL)),
    "half weight-only": side_by_side(48, (64, None, CHANNEL), (128, TOKEN, CHANNEL)),
}
INT4, INT8, ONLY, EAGER = "int4 tensor cores", "int8 tensor cores", "weight-only kernel", "eager"
CARDS = "sm_75, sm_80, sm_86, sm_87, sm_89 only, this is {}"
QUANTIZED = (ONLY, "activations are quantized")
OLD_CPU = (TORCH_INT8, "needs x86 with VNNI or AMX, where torch's int8 product is exact")
GROUPS = (TORCH_INT8, "scales of groups")


def twice(reason):
    return (EAGER, (INT4, reason), (INT8, reason), QUANTIZED)


# (layer, target): the path, then every faster path and the reason against it
CHOICES = {
    **{("W4A4", t): (INT4,) for t in ("sm_75", "sm_80", "sm_89")},
    **{("W4A4", t): (INT8, (INT4, CARDS.format(t))) for t in ("sm_90", "sm_100", "sm_120", "gfx942",
    "gfx1100")},
    ("W4A4", "H100"): (INT8, (INT4, CARDS.format("NVIDIA H100"))),
    ("W4A4", "gfx1030"): (EAGER, (INT4, CARDS.format("gfx1030")), (INT8, "no int8 matrix cores on gfx1030"),
    QUANTIZED),
    ("W4A4", "cpu"): (EAGER, ("triton", "needs a GPU"), OLD_CPU),
    ("W4", "cpu"): (EAGER, ("triton", "needs a GPU"), OLD_CPU),
    ("W4A4", "no triton"): (EAGER, ("triton", "Triton is not installed"), GROUPS),
    ("W4A4", "no compiler"): (
        EAGER, ("triton", "Triton cannot run here (RuntimeError: no C compiler)"), GROUPS
    ),
    ("W4", "triton 3.3"): (EAGER, ("triton", "needs Triton 3.4, found 3.3"), GROUPS),
    ("W4A4", "triton 3.5"): (INT8, (INT4, "needs Triton 3.6, found 3.5")),
    **{("W4A4 unsigned", t): (INT4,) for t in ("sm_75", "sm_89")},
    ("W4A8", "sm_75"): (EAGER, (INT4, "W4A8 is not 4 bit on both sides"),
    (INT8, "Triton has no int8 product for sm_75"), QUANTIZED),
    ("W4A8", "sm_89"): (INT8, (INT4, "W4A8 is not 4 bit on both sides")),
    ("W4A8", "sm_90"): (INT8, (INT4, CARDS.format("sm_90"))),
    ("W2A4", "sm_80"): (INT8, (INT4, "W2A4 is not 4 bit on both sides")),
    ("W2A4 in groups", "sm_90"): (
        EAGER, (INT4, CARDS.format("sm_90")),
        (INT8, "a group of 64 2-bit weights has 16 bytes, an int8 product takes 32"), QUANTIZED
    ),
    ("W2A4 in groups", "gfx942"): (INT8, (INT4, CARDS.format("gfx942"))),
    **{("W4", t): (ONLY, (INT4, "weight-only layer"), (INT8, "weight-only layer")) for t in ("sm_75",
    "sm_120", "gfx942", "gfx1030")},
    ("W4 of 128", "sm_89"): (EAGER, (INT4, "weight-only layer"), (INT8, "weight-only layer"),
    (ONLY, "groups of 128 weights, not 64")),
    ("groups of 32", "sm_89"): twice("groups of 64 weights or of 32 activations, not 64"),
    ("per tensor", "sm_89"): twice("one activation scale for a whole tensor"),
    ("unsigned 8 bit", "gfx942"): (EAGER, (INT4, CARDS.format("gfx942")),
    (INT8, "unsigned 8-bit codes do not fit into int8"), QUANTIZED),
    ("H512", "sm_89"): twice("Hadamard blocks of 512 channels, above 256"),
    ("100 channels", "sm_75"): (EAGER, (INT4, "100 channels, not a multiple of 64"),
    (INT8, "Triton has no int8 product for sm_75"), QUANTIZED),
    ("100 channels", "sm_89"): (INT4,),
    ("slices of 96", "sm_89"): twice("a slice of 96 channels, not a multiple of 64"),
    ("2-bit slice of 64", "sm_100"): (EAGER, (INT4, CARDS.format("sm_100")),
    (INT8, "a slice of 64 channels, not a multiple of 128"), QUANTIZED),
    ("half weight-only", "sm_89"): twice("weight-only layer"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("layer", "target"), CHOICES)
def test_path_and_reasons(layer, target):
    path, *refused = CHOICES[layer, target]
    choice = choose(SPECS[layer], TARGETS[target])
    assert (choice.path, list(choice.refused)) == (path, refused)
    assert str(choice) == "; ".join([path, *(f"{name}: {reason}" for name, reason in refused)])


@pytest.mark.quick
def test_the_interpreter_is_never_chosen_unless_asked_for(monkeypatch):
    spec = SPECS["W4A4"]
    assert not target_of("cpu").interpreted
    here = GROUPS if target_of("cpu").arch else OLD_CPU
    assert str(choose(spec, "cpu")) == f"eager; triton: needs a GPU; {here[0]}: {here[1]}"
    assert choose(spec, interpreter()).path == INT8
    assert kernel_target(torch.device("cpu")) == interpreter()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before triton is imported"):
        interpreter()


@pytest.mark.quick
def test_layers_that_do_not_fit_x_are_refused():
    spec = SPECS["W4A4"]
    tensors = random_tensors(spec)
    with pytest.raises(ValueError, match=r"the layer has 192 in-channels, x has the shape \(2, 191\)"):
        quant_linear(inputs(2, 191), spec, tensors)
    with pytest.raises(
        ValueError, match="x is on meta, the layer's weight on cpu: move the layer to the device of x"
    ):
        quant_linear(inputs(2, 192).to("meta"), spec, tensors)
    with pytest.raises(ValueError, match="x is on cpu, the layer's weight on meta"):
        quant_linear(inputs(2, 192), spec, {k: t.to("meta") for k, t in tensors.items()})


@pytest.mark.parametrize(
    ("layer", "target", "rows", "dtype"),
    [
        ("W4A4", interpreter(), 5, torch.float32),
        ("W4A4", TARGETS["sm_75"], 5, BF16),
        ("W4", interpreter(), ROW_LIMIT + 1, HALF),
    ],
    ids=["fp32", "bf16 on Turing", "weights only, many rows"],
)
def test_x_that_no_kernel_takes_goes_the_eager_way(layer, target, rows, dtype):
    spec = SPECS[layer]
    tensors, x = random_tensors(spec, dtype=dtype), 2 * inputs(rows, 192, dtype)
    lora = [(inputs(4, 192, dtype), inputs(16, 4, dtype), 8)]
    spec, tensors = with_lora(spec, tensors, lora, dtype)
    y = quant_linear(x, spec, tensors, Gelu(), target)
    assert torch.equal(y, eager.quant_linear(Gelu()(x), spec, tensors))


def test_spec_and_target_survive_as_constants():
    for spec in SPECS.values():
        assert parse(spec.text) == spec
    for target in TARGETS.values():
        assert Target(*target.fields) == target


class Layer(torch.nn.Module):
    """A quantized layer after a plain one and a LayerNorm or a GELU, on the interpreter."""

    def __init__(self, spec, seed=0):
        super().__init__()
        self.spec, self.target = spec, interpreter()
        self.tensors = random_tensors(spec, seed, dtype=HALF)
        self.first = torch.nn.Linear(32, spec.in_features, dtype=HALF)
        self.modulation = inputs(1, spec.in_features, HALF, 3)

    def forward(self, x):
        before = (
            Gelu() if self.spec.weight_only else LayerNormModulate(self.modulation.sin(), self.modulation)
        )
        return torch.relu(quant_linear(self.first(x), self.spec, self.tensors, before, self.target))


def compiled(module):
    """The module compiled without graph breaks, and the graphs that were made of it."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, examples):
        graphs.append(graph)
        return aot_eager(graph, examples)

    torch._dynamo.reset()
    graphs = []
    return torch.compile(module, fullgraph=True, backend=backend), graphs


TWO_PARTS = side_by_side(
    48, (64, ActivationSpec(), WeightSpec()), (128, UNSIGNED, WeightSpec()), smooth=True, rank=8
)
LEARNED = spec_of(256, 48, TOKEN, CHANNEL, smooth=True, kronecker=(8, 16))


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [TWO_PARTS, SPECS["W4A4"], SPECS["W4"], LEARNED],
    ids=["two parts", "one part", "weights only", "learned transform"],
)
def test_compiled_layer_is_one_operator_and_gives_the_same(spec):
    module, x = Layer(spec), inputs(10, 32, HALF).view(2, 5, 32)
    run, graphs = compiled(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo detected a call to a `functools.lru_cache`")
        assert torch.equal(run(x), module(x))
    (graph,) = graphs
    assert sum(node.target is op.layer for node in graph.graph.nodes) == 1
    assert torch.equal(run(x[:, :3]), module(x[:, :3]))


@torch.no_grad()
def test_compiled_code_is_shared_by_equal_specs_only():
    run, graphs = compiled(lambda module, x: module(x))
    x = inputs(3, 32, HALF)
    modules = [
        Layer(TWO_PARTS, 0),
        Layer(parse(TWO_PARTS.text), 1),
        Layer(replace(TWO_PARTS, parts=SPECS["W4A4"].parts), 2),
    ]
    for module, count in zip(modules, (1, 1, 2), strict=True):
        assert torch.equal(run(module, x), module(x))
        assert len(graphs) == count


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # to the cached Hadamard matrix
@pytest.mark.parametrize(
    "spec",
    [TWO_PARTS, SPECS["W4"], spec_of(192, 48, rotation=64), LEARNED],
    ids=["two parts", "weights only", "rotation", "learned"],
)
def test_compiled_eager_path_gives_the_same(spec):
    k = spec.in_features
    module, x = QuantLinear(QuantizedLayer("layer", spec, random_tensors(spec))), inputs(10, k).view(2, 5, k)
    run, graphs = compiled(module)
    assert torch.equal(run(x), module(x))
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("target", [interpreter(), None], ids=["kernels", "eager"])
def test_lora_merged_in_compiled_code(target):
    """A spec of the larger rank is made while torch.compile looks on."""

    def module(x):
        return quant_linear(x, *with_lora(TWO_PARTS, tensors, lora, x.dtype), target=target)

    tensors, x = random_tensors(TWO_PARTS, dtype=HALF), inputs(3, 192, HALF)
    lora = [(inputs(4, 192, HALF), inputs(16, 4, HALF), 8)]
    assert torch.equal(compiled(module)[0](x), module(x))


def test_the_operator_keeps_to_its_schema():
    for spec in (TWO_PARTS, SPECS["W4"], LEARNED):
        tensors, x = random_tensors(spec, dtype=HALF), inputs(5, spec.in_features, HALF)
        parts = [
            tensors.get(name)
            for name in (
                "weight",
                "weight_scale",
                "smooth_factor",
                "proj_down",
                "proj_up",
                "bias",
                "transform",
                "outer_scale",
            )
        ]
        torch.library.opcheck(op.layer.default, (x, spec.text, *parts, *NOTHING))


@pytest.mark.quick
def test_scales_of_the_wrong_shape_are_named():
    spec = spec_of(128, 16)
    tensors = random_tensors(spec)
    with pytest.raises(
        ValueError, match=re.escape("weight_scale should have the shape (2, 16) for W4A4 g64, found (16, 2)")
    ):
        quant_linear(torch.randn(3, 128), spec, tensors | {"weight_scale": tensors["weight_scale"].T})


@pytest.mark.parametrize(
    ("backend", "arch", "taken"),
    [
        ("cuda", 75, False),
        ("cuda", 86, True),
        ("cuda", 90, True),
        ("cuda", 120, True),
        ("hip", "gfx942", True),
        ("hip", "gfx1100", False),
        ("cpu", "", True),
        ("cpu", "int8", True),
    ],
)
def test_where_components_run_as_layers_without_them(backend, arch, taken):
    assert takes_components(Target(backend, arch, (3, 6))) == taken
