"""torch.compile of a quantized model, as ComfyUI's TorchCompileModel does it: no graph break of ours, the
same result, adapters that come and go afterwards."""

import pytest
import torch

from comfyui_nibble.tests.codes import assert_repeats, record
from comfyui_nibble.tests.host.inside import load, module, packed_hash, sample
from comfyui_nibble.tests.host.test_adapters import (
    LINEAR2,
    MLP,
    MODULATION,
    QKV,
    SHAPES,
    H,
    adapter,
    randn,
    with_lora,
)
from comfyui_nibble.tests.support import relative_error


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


KINDS = ((), ("lora",), ("lora and bias",), ("dora",), ("lokr",), ("diff",))


@pytest.mark.parametrize("kinds", KINDS, ids=lambda k: k[0] if k else "none")
@pytest.mark.parametrize("key", [QKV, MLP, LINEAR2, MODULATION])
def test_layer_is_one_graph(base, key, kinds):
    """Group scales, shifted codes after GELU, two parts, weight-only; with what adapters put beside them."""
    patched = base
    for kind in kinds:
        patched = with_lora(patched, adapter(kind, key))
    layer, x = module(load(patched), key), randn(1, 7, SHAPES[key][1])
    assert layer.spec is not None
    want = layer(x)
    with torch.no_grad():
        got = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(want, got)
    load(base)


def pytorch_attention():
    """What ComfyUI takes on a GPU. Its choice on a CPU, sub-quadratic attention, asks for the free memory and
    so breaks every graph."""
    from comfy.ldm.modules.attention import attention_pytorch

    return {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}


def block_inputs(batch=1):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    rotation = torch.eye(2).expand(1, 1, 16 + 8, 64, 2, 2).contiguous()
    return rand(batch, 16, H), rand(batch, 8, H), rand(batch, 1, H), rotation


def run_block(block, double, options):
    img, txt, vec, pe = block_inputs()
    with torch.no_grad():
        out = (
            block(img, txt, vec, pe, transformer_options=options)
            if double
            else block(torch.cat((txt, img), 1), vec, pe, transformer_options=options)
        )
    return torch.cat(out, 1) if double else out


@pytest.mark.arithmetic
@pytest.mark.parametrize("name", ["double_blocks.0", "single_blocks.1"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transformer_block_is_one_graph(comfy, base, name, backend):
    """A whole block of ComfyUI around our layers, with a LoRA on some of them."""
    patched = load(with_lora(base, adapter("lora", QKV) | adapter("dora", MLP)))
    block, double = comfy.utils.get_attr(patched.model.diffusion_model, name), name.startswith("double")
    options = pytorch_attention()
    recorded = record(run_block, block, double, options)
    assert_repeats(
        recorded, run_block, torch.compile(block, backend=backend, fullgraph=True), double, options
    )
    load(base)


def test_whole_network_is_one_graph_as_in_full_precision(base, full):
    counts = {}
    for name, patcher in (("full", full), ("packed", base)):
        load(patcher)
        g = torch.Generator().manual_seed(0)
        x, context, pooled = (torch.randn(1, *s, generator=g) for s in ((16, 16, 16), (8, 128), (128,)))
        args = x, torch.full((1,), 0.7), context, pooled
        with torch.no_grad():
            found = torch._dynamo.explain(patcher.model.diffusion_model)(
                *args, guidance=torch.full((1,), 3.5), transformer_options=pytorch_attention()
            )
        counts[name] = found.graph_break_count
        torch._dynamo.reset()
    assert counts == {"full": 0, "packed": 0}


@pytest.fixture
def base_on_gpu_attention(base):
    out = base.clone()
    out.model_options["transformer_options"] |= pytorch_attention()
    return out


def compiled(patcher, backend):
    """What TorchCompileModel makes of a model; its own node offers inductor and cudagraphs only."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    out = patcher.clone(disable_dynamic=True)
    options = (
        {"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]}
        if backend == "inductor"
        else None
    )
    set_torch_compile_wrapper(model=out, backend=backend, options=options)
    return out


def test_adapters_come_and_go_under_a_compiled_model(base_on_gpu_attention):
    """One compiled model, with a LoRA, another and none: what was compiled for one is not used for the
    next."""
    base = base_on_gpu_attention
    adapters = {
        "none": {},
        "lora": adapter("lora", QKV) | adapter("lora", MLP),
        "lokr": adapter("lokr", LINEAR2),
        "bias": adapter("lora and bias", MLP),
    }
    models = {k: with_lora(base, t) if t else base for k, t in adapters.items()}
    recorded, before = {k: record(sample, m) for k, m in models.items()}, packed_hash(base)
    assert min(relative_error(recorded["none"][0], recorded[k][0]) for k in ("lora", "lokr", "bias")) > 0.01
    fast = compiled(base, "aot_eager")
    models = {k: with_lora(fast, t) if t else fast for k, t in adapters.items()}
    for kind in ("none", "lora", "none", "lokr", "bias", "lora"):
        assert_repeats(recorded[kind], sample, models[kind])
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    )  # it was compiled, and again for each set of tensors
    assert not torch._dynamo.utils.counters["graph_break"]
    assert packed_hash(base) == before


def test_inductor_through_the_stock_node(comfy, base_on_gpu_attention, full):
    """TorchCompileModel's default backend, with a LoRA loaded behind it and a hook LoRA that comes and goes.
    It moves calls of the quantizer and what stands between them, so that codes of another run cannot be
    taken: where some flip, two runs lie nearer to each other than to full precision. 9e-7 measured without a
    flip."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    base, tensors = base_on_gpu_attention, adapter("lora", QKV) | adapter("lora", MLP)
    group = comfy.hooks.create_hook_lora(tensors, 0.8, 0.0)
    plain, moved, exact = (
        sample(base),
        sample(with_lora(base, tensors, 0.8)),
        sample(with_lora(full, tensors, 0.8)),
    )
    cost = relative_error(exact, moved)
    (fast,) = TorchCompileModel.execute(base, "inductor").result
    assert relative_error(moved, sample(with_lora(fast, tensors, 0.8))) < cost / 2
    assert relative_error(moved, sample(fast, hooks=group)) < cost / 2
    assert torch._dynamo.utils.counters["inductor"]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert relative_error(plain, moved) > 0.15 > cost / 2
