"""How kinds of models are sampled where nobody says, on small ones of ComfyUI's own classes."""

from types import SimpleNamespace

import pytest

from comfyui_nibble.tests.host.sweep.flow import replaced
from comfyui_nibble.tests.host.sweep.registry import ENTRIES
from comfyui_nibble.tests.host.sweep.tiny import make


def made(name):
    entry = next(e for e in ENTRIES if e.id == name)
    with replaced(entry.replace):
        return make(entry)


@pytest.mark.parametrize(
    ("name", "cfg", "steps", "latent"),
    [
        ("PixArtSigma", 4.5, 20, (1, 4, 128, 128)),
        ("SD3", 4.5, 28, (1, 16, 128, 128)),
        ("QwenImage", 2.5, 20, (1, 16, 1, 128, 128)),
        ("WAN21_T2V", 6.0, 20, (1, 16, 9, 60, 60)),
        ("Flux2 (Klein 4B)", 1.0, 20, (1, 128, 64, 64)),
    ],
)
def test_defaults_and_empty_latents(comfy, one_thread, name, cfg, steps, latent):
    from comfyui_nibble.nodes.host.kinds import empty_latent, kind_of

    model = made(name)
    kind = kind_of(model)
    assert (kind.cfg, kind.steps) == (cfg, steps)
    assert tuple(empty_latent(model, kind.side, kind.frames)["samples"].shape) == latent


@pytest.mark.parametrize(
    ("file", "cfg", "steps"),
    [
        ("qwen-image-lightning-4steps.safetensors", 1.0, 8),
        ("z_image_turbo_bf16.safetensors", 1.0, 8),
        ("qwen_image_bf16.safetensors", 2.5, 20),
        ("qwen_image_1024steps_more.sft", 2.5, 20),
    ],
)
def test_distilled_models_are_known_by_their_names(comfy, one_thread, file, cfg, steps):
    from comfyui_nibble.nodes.host.kinds import kind_of

    model = made("QwenImage")
    model.cached_patcher_init = (None, (f"/models/{file}", {}))
    kind = kind_of(model)
    assert (kind.cfg, kind.steps) == (cfg, steps)


def test_sound_needs_a_latent(comfy):
    from comfyui_nibble.nodes.host.kinds import empty_latent

    sound = SimpleNamespace(get_model_object=lambda name: SimpleNamespace(latent_dimensions=1))
    with pytest.raises(ValueError, match="no model of pictures or video: connect a latent_image"):
        empty_latent(sound, 512, 1)
