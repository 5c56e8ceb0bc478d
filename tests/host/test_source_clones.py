"""Several clones of one model: what one of them has put on the modules that they share, wrapped blocks,
injections, hooks, LoRAs, is not read as part of another, of a source and of a quantized model alike."""

import inspect

import pytest
import torch

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.inside import load, packed_hash, sample
from comfyui_nibble.tests.host.test_adapters import LINEAR2, MLP, QKV, H, adapter, randn, with_lora
from comfyui_nibble.tests.host.test_source import PREFIX, bypassed, quantize, source_of, weight  # noqa: F401
from comfyui_nibble.tests.support import relative_error

BLOCK, SINGLE = f"{PREFIX}double_blocks.0", f"{PREFIX}single_blocks.1"


@pytest.fixture
def full(comfy, tiny_state):
    """One of its own for each test: what clones leave behind stays."""
    return comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))


class Wrap(torch.nn.Module):
    """What torch.compile of a block is to the names of what is in it; it does not hand on attributes."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args, **kwargs):
        return self._orig_mod(*args, **kwargs)


def compiled(module):
    return torch.compile(module, backend="eager")


def wrapped(patcher, wrap=Wrap, names=(BLOCK, SINGLE)):
    """A clone with wrapped blocks, as nodes that compile block by block make it."""
    clone = patcher.clone()
    for name in names:
        clone.add_object_patch(name, wrap(clone.get_model_object(name)))
    return clone


def inserted(patcher):
    """A clone with an injection that puts a module of its own into the network, as motion modules are."""
    from comfy.patcher_extension import PatcherInjection

    blocks, motion = patcher.model.diffusion_model.single_blocks, torch.nn.Linear(3, 3)
    inject = lambda p: blocks.register_module("motion", motion)
    clone = patcher.clone()
    clone.set_injections(
        "motion", [PatcherInjection(inject=inject, eject=lambda p: blocks.__delattr__("motion"))]
    )
    return load(clone)


def hooked(patcher):
    import comfy.hooks

    sample(patcher, 1, hooks=comfy.hooks.create_hook_lora(adapter("lora", QKV), 1.0, 0.0))


def stopped_under_a_hook(patcher):
    import comfy.hooks

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patcher, 2, hooks=comfy.hooks.create_hook_lora(adapter("lora", QKV), 1.0, 0.0), callback=stop)


def with_a_weight_put_in(patcher):
    clone = patcher.clone()
    clone.add_object_patch(f"{QKV}.weight", torch.nn.Parameter(torch.zeros(3 * H, H), requires_grad=False))
    return load(clone)


LEFT = {
    "wrapped blocks": lambda m: sample(wrapped(m), 1),
    "compiled blocks": lambda m: sample(wrapped(m, compiled), 1),
    "a compiled network": lambda m: sample(wrapped(m, compiled, ["diffusion_model"]), 1),
    "a LoRA": lambda m: sample(with_lora(m, adapter("lora", QKV) | adapter("lora and bias", MLP)), 1),
    "a LoRA in a wrapped block": lambda m: sample(lora_in_wrapped(m), 1),
    "a bypass LoRA": lambda m: sample(bypassed(m, adapter("lora", QKV)), 1),
    "an inserted module": inserted,
    "a weight": with_a_weight_put_in,
    "a hook": hooked,
    "a stopped hook": stopped_under_a_hook,
}


def lora_in_wrapped(patcher):
    """Patched under the names that tensors have in a wrapped block."""
    clone = load(wrapped(patcher, compiled))
    key = QKV.replace(BLOCK, f"{BLOCK}._orig_mod")
    clone.add_patches({f"{key}.weight": ("diff", (randn(3 * H, H),))})
    assert clone.patches
    return clone


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("left", LEFT)
def test_a_source_is_the_model_without_what_another_clone_has_left(full, source_of, left):  # noqa: F811
    before = {key: source_of(full).get(key).clone() for key in source_of(full).shapes}
    fingerprint = source_of(full).fingerprint()
    held = LEFT[left](full)
    state = lambda: [
        (list(m.named_modules()), list(m.state_dict()), [c.forward for c in m.modules()])
        for m in [full.model]
    ]
    left_so = state()
    source = source_of(full)
    assert state() == left_so  # reading is no change of the model that ComfyUI holds
    assert list(source.shapes) == list(before)
    assert source.fingerprint() == fingerprint
    assert len(source.layers) == 16
    for key, tensor in before.items():
        assert torch.equal(source.get(key), tensor)
    del held


@pytest.mark.parametrize("wrap", [Wrap, compiled])
def test_blocks_that_a_node_has_compiled_are_their_own_weights(
    full,
    source_of,  # noqa: F811
    wrap,
    monkeypatch,
    tmp_path,
    caplog,
):
    """Before and after the first run of the compiled model, which is the one in front of the node; the log
    says that it is not compiled."""
    plain = packed_hash(quantize(full, monkeypatch, tmp_path))
    model = wrapped(full, wrap)
    for run in range(2):
        caplog.clear()
        made = quantize(model, monkeypatch, tmp_path)
        assert packed_hash(made) == plain
        assert made.object_patches == {}
        assert f"the quantized model runs without the torch.compile of {BLOCK}, {SINGLE}" in caplog.text
        if not run:
            sample(model, 1)


def test_a_wrapper_of_something_else_is_refused(full, source_of):  # noqa: F811
    from comfyui_nibble.nodes.host.inherited import NotInheritable

    clone = full.clone()
    clone.add_object_patch(BLOCK, Wrap(Wrap(clone.get_model_object(BLOCK))))
    with pytest.raises(NotInheritable, match=f"object patches on {BLOCK}, which"):
        source_of(clone)


def calibrated(model, folder, monkeypatch) -> Calibration:
    import folder_paths

    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    g = torch.Generator().manual_seed(1)
    prompt = [
        [
            torch.randn(1, 8, 128, generator=g),
            {"pooled_output": torch.randn(1, 128, generator=g), "guidance": 3.5},
        ]
    ]
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    with torch.inference_mode():
        return NibbleCalibrate.execute(
            model, {"positive0": prompt}, latent, "euler", "simple", 2, 1.0, 1, 2, 4.0, True
        ).args[0]


def through_the_node(patcher):
    """What TorchCompileModel makes of a model."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = patcher.clone()
    set_torch_compile_wrapper(clone, backend="eager")
    return clone


@pytest.mark.parametrize(
    "compile_", [through_the_node, lambda m: wrapped(m, compiled)], ids=["network", "blocks"]
)
def test_a_compiled_model_is_calibrated_as_it_is_without(full, compile_, tmp_path, monkeypatch):
    """Graphs that were compiled before the hooks came would not call them."""
    model = compile_(full)
    sample(model, 1)
    a, b = calibrated(full, tmp_path / "a", monkeypatch), calibrated(model, tmp_path / "b", monkeypatch)
    assert a.meta["model"] == b.meta["model"]
    assert len(a.names) == len(b.names) == 13
    for name in a.names:
        assert a.get(name).count == b.get(name).count > 0
        assert torch.equal(a.get(name).tokens, b.get(name).tokens)


def test_the_quantized_model_is_compiled_where_the_source_was(full, monkeypatch, tmp_path):
    """Its own network: ComfyUI's wrapper holds on to the one that it was made for."""
    want = sample(quantize(full, monkeypatch, tmp_path))
    made = quantize(through_the_node(full), monkeypatch, tmp_path)
    assert torch.equal(sample(made), want)
    (wrapper,) = made.wrappers["apply_model"]["torch.compile"]
    held = inspect.getclosurevars(wrapper).nonlocals["compiled_module_dict"]
    assert {name: module._orig_mod for name, module in held.items()} == {
        "diffusion_model": made.model.diffusion_model
    }


# -- settings that are carried


def test_settings_of_the_network_stay_in_force(full, monkeypatch, tmp_path):
    """FluxKVCache sets one; it acts on what the network does with reference pictures."""
    from comfy_extras.nodes_flux import FluxKVCache

    made = quantize(FluxKVCache.execute(full).args[0], monkeypatch, tmp_path)
    load(made)
    assert made.model.diffusion_model.params.default_ref_method == "index_timestep_zero"
    assert set(made.object_patches) == {f"{PREFIX}params.default_ref_method"}


def test_methods_of_the_model_ask_the_new_one(full, monkeypatch, tmp_path):
    import types

    model = full.clone()
    model.add_object_patch(
        "memory_required", types.MethodType(lambda self, *args, **kwargs: id(self), full.model)
    )
    model.add_object_patch("manual_cast_dtype", torch.bfloat16)
    made = quantize(model, monkeypatch, tmp_path)
    assert made.object_patches["memory_required"]() == id(made.model) != id(full.model)
    assert made.object_patches["manual_cast_dtype"] == torch.bfloat16


def test_attachments_of_other_packs_come_along(full, monkeypatch, tmp_path):
    model = full.clone()
    model.set_attachments("other pack", {"a": 1})
    made = quantize(model, monkeypatch, tmp_path)
    assert made.attachments["other pack"] == {"a": 1}
    assert made.attachments["nibble"]["family"] == "flux"


def test_models_that_wrappers_run_come_along(comfy, full, tiny_state, monkeypatch, tmp_path):
    """ComfyUI loads them with the model that they are on; clones for other cards are of the old model."""
    model, other = full.clone(), comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))
    model.set_additional_models("other pack", [other])
    model.set_additional_models("multigpu", [full.clone()])
    made = quantize(model, monkeypatch, tmp_path)
    assert list(made.additional_models) == ["other pack"]
    assert [m.is_clone(other) for m in made.get_additional_models_with_key("other pack")] == [True]


# -- quantized models


@pytest.fixture
def quantized(tiny_packed, one_thread):
    return tiny_packed()


PUT_ON = {
    "wrapped": lambda m: wrapped(m),
    "compiled": lambda m: wrapped(m, compiled),
    "wrapped, with a LoRA": lambda m: wrapped(with_lora(m, adapter("lora and bias", QKV))),
    "a bypass LoRA": lambda m: bypassed(m, adapter("lora", QKV)),
}


@pytest.mark.parametrize("on_loading", [False, True], ids=["sampled", "loaded"])
@pytest.mark.parametrize("kind", PUT_ON)
def test_a_quantized_model_is_saved_without_what_a_clone_has_left(
    quantized, kind, on_loading, tmp_path, monkeypatch
):
    """loaded: where the run broke off before ComfyUI's clean-up."""
    import folder_paths

    from comfyui_nibble.nodes.files import NibbleSaveModel

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    before = PackFile(NibbleSaveModel.execute(quantized, "before").args[0])
    clone = PUT_ON[kind](quantized)
    _ = load(clone) if on_loading else sample(clone, 1)
    after = PackFile(NibbleSaveModel.execute(quantized, "after").args[0])
    assert after.specs == before.specs
    assert after.rest == before.rest
    assert all(torch.equal(before.tensor(key), after.tensor(key)) for key in before.rest)
    for name in before.specs:
        a, b = before.layer(name).tensors, after.layer(name).tensors
        assert all(torch.equal(a[leaf], b[leaf]) for leaf in a)


def test_the_compiled_model_itself_is_saved_swapped_exported_and_rebuilt(
    quantized, full, tmp_path, monkeypatch
):
    import folder_paths

    from comfyui_nibble.nodes.export import NibbleExportModel
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import load as load_file
    from comfyui_nibble.nodes.swap import NibbleSwapBlocks

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    quantized.attachments["nibble"] |= {"provenance": {"model": "of the test"}}
    want = sample(quantized)
    clone = load(wrapped(quantized))
    assert torch.equal(sample(clone), want)
    load(clone)
    assert torch.equal(sample(load_file(NibbleSaveModel.execute(clone, "saved").args[0])), want)
    load(clone)
    exported = NibbleExportModel.execute(clone, "nibble", "exported", False, "int8").args[0]
    assert torch.equal(sample(load_file(exported)), want)
    load(clone)
    make, args = clone.cached_patcher_init
    assert torch.equal(sample(make(*args)), want)
    load(clone)
    assert torch.equal(sample(NibbleSwapBlocks.execute(clone, quantized, "double 0").args[0]), want)
    assert torch.equal(sample(NibbleSwapBlocks.execute(clone, wrapped(full), "all").args[0]), sample(full))


def test_a_lora_is_baked_from_a_wrapped_model(quantized):
    from comfyui_nibble.nodes.bake import NibbleBakeLora

    patched, bias = (
        with_lora(quantized, adapter("lora and bias", QKV) | adapter("lora", LINEAR2)),
        quantized.model.state_dict()[f"{QKV}.bias"],
    )
    want, got = (
        NibbleBakeLora.execute(m, 0).args[0].model.state_dict() for m in (patched, load(wrapped(patched)))
    )
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert not torch.equal(want[f"{QKV}.bias"], bias)


def test_a_lora_acts_in_wrapped_blocks_and_is_found_after_a_run(quantized):
    """ComfyUI itself looks for patches under the names of the moment, and drops the rest."""
    want = sample(with_lora(quantized, adapter("lora", QKV) | adapter("lora", LINEAR2)))
    assert relative_error(sample(quantized), want) > 0.05
    clone = wrapped(quantized)
    assert torch.equal(sample(with_lora(clone, adapter("lora", QKV) | adapter("lora", LINEAR2))), want)
    sample(clone)
    assert torch.equal(sample(with_lora(clone, adapter("lora", QKV) | adapter("lora", LINEAR2))), want)
    assert torch.equal(sample(with_lora(quantized, adapter("lora", QKV) | adapter("lora", LINEAR2))), want)


def test_what_acts_on_a_quantized_models_own_layers_is_refused(quantized, full):
    from comfyui_nibble.nodes.host.inherited import NotInheritable
    from comfyui_nibble.nodes.swap import NibbleSwapBlocks

    for a, b in ((quantized.clone(), full), (quantized, full.clone())):
        patched = b if a is quantized else a
        patched.add_object_patch(f"{BLOCK}.forward", lambda *args, **kwargs: None)
        with pytest.raises(NotInheritable, match=f"object patches on {BLOCK}.forward, which"):
            NibbleSwapBlocks.execute(a, b, "double 0")
