"""What a ComfyUI after 0.33 does differently with a model's patcher, played on the one at hand: new
arguments, and patches that are no tensors.

Read off Comfy-Org/ComfyUI up to version file 0.38: `fast_disk` of ModelPatcher, which `clone` hands on, and
`("config", (bytes,))` for keys that end in `.config`, which `add_patches` makes an object patch of.
"""

import pytest
import torch

from comfyui_nibble.tests.host.inside import forward, load, module
from comfyui_nibble.tests.host.test_adapters import MLP, QKV, H, adapter, randn, with_lora
from comfyui_nibble.tests.host.test_patcher import CPU, hooked, lora_on
from comfyui_nibble.tests.support import relative_error

DIFFERENCE = {f"{QKV}.weight": ("diff", (randn(3 * H, H),))}


@pytest.fixture
def newer(comfy, monkeypatch):
    """A function of a ModelPatcher method's name that gives it an argument `fast_disk`, and the list of the
    values it then gets."""

    def play(name):
        inner, seen = getattr(comfy.model_patcher.ModelPatcher, name), []

        def method(self, *args, fast_disk=None, **kwargs):
            seen.append(fast_disk)
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, name, method)
        return seen

    return play


CALLS = {  # of each method that NibblePatcher overrides: how a newer ComfyUI would call it
    "add_patches": lambda p: p.add_patches(DIFFERENCE, 1.0, 1.0, fast_disk=True),
    "add_weight_wrapper": lambda p: p.add_weight_wrapper(
        "diffusion_model.img_in.weight", lambda w: w, fast_disk=True
    ),
    "set_injections": lambda p: p.set_injections("bypass_lora", [], fast_disk=True),
    "patch_weight_to_device": lambda p: p.patch_weight_to_device(f"{MLP}.bias", fast_disk=True),
    "get_key_patches": lambda p: p.get_key_patches("diffusion_model.", fast_disk=True),
    "cleanup": lambda p: p.cleanup(fast_disk=True),
    "load": lambda p: p.load(CPU, full_load=True, fast_disk=True),
    "partially_unload": lambda p: load(p).partially_unload(CPU, 1000, fast_disk=True),
    "unpatch_model": lambda p: p.unpatch_model(CPU, fast_disk=True),
    "patch_hooks": lambda p: p.patch_hooks(None, fast_disk=True),
    "unpatch_hooks": lambda p: p.unpatch_hooks(fast_disk=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_new_arguments_reach_comfyui(base, newer, name):
    patched, seen = with_lora(base, lora_on(QKV)), newer(name)
    CALLS[name](patched)
    assert True in seen
    load(base)


def test_new_arguments_of_hooks_reach_comfyui(comfy, base, newer):
    group = comfy.hooks.create_hook_lora(lora_on(QKV) | {f"{MLP}.diff_b": randn(H)}, 1.0, 0.0)
    patcher = hooked(comfy, base, group)
    seen = newer("add_hook_patches")
    patcher.add_hook_patches(group.hooks[0], DIFFERENCE, 1.0, 1.0, fast_disk=True)
    assert seen == [True]
    seen, combined = newer("patch_hook_weight_to_device"), patcher.get_combined_hook_patches(group)
    counter = comfy.model_patcher.MemoryCounter(0)
    for key in (f"{MLP}.bias", f"{QKV}.weight"):
        patcher.patch_hook_weight_to_device(
            group, combined, key, patcher.get_key_patches(), counter, fast_disk=True
        )
    assert seen == [True]  # the bias; a packed weight is never ModelPatcher's to patch
    patcher.cleanup()
    load(base)


def test_every_overridden_method_is_called_above():
    """So that one that is overridden tomorrow is played here too."""
    import inspect

    from comfy.model_patcher import ModelPatcher

    from comfyui_nibble.nodes.host.patcher import NibblePatcher

    own = {n for n, f in vars(NibblePatcher).items() if inspect.isfunction(f) and hasattr(ModelPatcher, n)}
    without_arguments = {"__init__", "model_size", "state_dict_for_saving"}
    assert own == set(CALLS) | {"add_hook_patches", "patch_hook_weight_to_device"} | without_arguments


def test_fast_disk_of_the_constructor_is_handed_on_to_clones(comfy, base, monkeypatch):
    made = comfy.model_patcher.ModelPatcher.__init__

    def init(self, *args, fast_disk=False, **kwargs):
        made(self, *args, **kwargs)
        self.fast_disk = fast_disk

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "__init__", init)
    again = type(base)(base.model, base.load_device, base.offload_device, fast_disk=True)
    assert again.fast_disk
    assert again.model is base.model


class Attention(torch.nn.Module):
    """What a newer ComfyUI's attention is to its LoRA loader: it makes another of itself by a
    configuration."""

    def __init__(self, config=b"{}"):
        super().__init__()
        self.chosen = config

    def with_config(self, config):
        return Attention(config)


@pytest.fixture
def configurable(comfy, tiny_packed, monkeypatch):
    """A packed model with such a module in its first block, and an `add_patches` that knows it."""
    patcher, inner = tiny_packed(), comfy.model_patcher.ModelPatcher.add_patches
    patcher.model.diffusion_model.double_blocks[0].comfy_attention = Attention()

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        configs = {k: v for k, v in patches.items() if isinstance(v, tuple) and v[0] == "config"}
        for k, (_, (config,)) in configs.items():
            if strength_patch:
                name = k.rpartition(".")[0]
                self.add_object_patch(name, self.get_model_object(name).with_config(config))
        rest = {k: v for k, v in patches.items() if k not in configs}
        return [*configs, *inner(self, rest, strength_patch, strength_model)]

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "add_patches", add_patches)
    return patcher


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_attention_preferences_of_a_lora_pass(comfy, configurable, one_thread, strength):
    key = "diffusion_model.double_blocks.0.comfy_attention.config"
    loaded = comfy.lora.load_lora(adapter("lora", QKV), {QKV: f"{QKV}.weight"})
    patched = configurable.clone()
    added = patched.add_patches(loaded | {key: ("config", (b'{"attention": "x"}',))}, strength)
    assert set(added) == {f"{QKV}.weight", key}
    assert [v.chosen for v in patched.object_patches.values()] == [b'{"attention": "x"}'] * bool(strength)
    want = forward(configurable)
    out = forward(patched)
    assert (relative_error(want, out) > 1e-4) == bool(strength)
    assert bool(module(patched, QKV).attached.key) == bool(strength)


def test_a_preference_does_not_make_another_models_lora_fit(comfy, configurable):
    key = "diffusion_model.double_blocks.0.comfy_attention.config"
    wrong = {
        f"{MLP}.weight": comfy.lora.load_lora(
            {f"{MLP}.lora_up.weight": randn(9, 4), f"{MLP}.lora_down.weight": randn(4, 9)}, {MLP: "w"}
        )["w"]
    }
    with pytest.raises(
        RuntimeError, match="a LoRA of 9 x 9 on 256 x 1024 weights, made for another model, cannot be put"
    ):
        configurable.clone().add_patches({key: ("config", (b"{}",))} | wrong)
