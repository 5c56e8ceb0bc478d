"""Dynamic VRAM is ComfyUI's other way of holding models: it casts weights by a protocol of its own, which
packed layers do not take, so a Nibble model always has the plain patcher. Without a GPU the dynamic one gives
way to the plain one by itself, and ComfyUI 0.33 does not start with --cpu and --enable-dynamic-vram; what can
be seen here is which class is asked for."""

import pytest
import torch

from comfyui_nibble.tests.host.inside import forward, module, packed_hash
from comfyui_nibble.tests.host.test_adapters import MLP, QKV, adapter, with_lora


@pytest.fixture
def asked(comfy, monkeypatch):
    """The models for which the dynamic patcher was asked, where it is enabled as ComfyUI's start enables
    it."""
    models = []

    class Observed(comfy.model_patcher.ModelPatcherDynamic):
        def __new__(cls, model, *args, **kwargs):
            models.append(model)
            return super().__new__(cls, model, *args, **kwargs)

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Observed)
    return models


def test_a_nibble_model_never_asks_for_it(comfy, asked, tiny_packed, tiny_state):
    full = comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))
    assert asked == [full.model]
    packed = tiny_packed()
    make, args = packed.cached_patcher_init
    again = make(*args, disable_dynamic=False)
    assert asked == [full.model]
    assert not any(p.is_dynamic() for p in (packed, packed.clone(), again, again.clone()))


def test_clone_without_it_is_the_same_model(asked, tiny_packed):
    """What TorchCompileModel and others ask for before they work on a model."""
    base = tiny_packed()
    patched = with_lora(base, adapter("lora", QKV) | adapter("dora", MLP))
    want, before = forward(patched), packed_hash(base)
    clone = patched.clone(disable_dynamic=True)
    assert type(clone) is type(base)
    assert clone.model is base.model
    assert clone.patches.keys() == patched.patches.keys()
    assert torch.equal(forward(clone), want)
    assert packed_hash(clone) == before
    assert {k for k in (QKV, MLP) if module(clone, k).attached.key} == {QKV, MLP}
    clone.detach()
    assert asked == []
