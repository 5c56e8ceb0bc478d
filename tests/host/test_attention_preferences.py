"""Files of ComfyUI after 0.33 say which attention a block takes, as JSON in a uint8 tensor: no packed weight,
and kept wherever it goes."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.inside import forward
from comfyui_nibble.tests.support import nibble, relative_error

KEY = "double_blocks.0.img_attn.comfy_attention.config"
CONFIG = torch.tensor(list(json.dumps({"attention": "comfy_kitchen_int8"}).encode()), dtype=torch.uint8)


class Preference(torch.nn.Module):
    """What the newer ComfyUI has below each attention: it takes the tensor from the state dict and gives it
    back."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (config := state_dict.get(f"{prefix}config")) is not None:
            self.register_buffer("config", config)


@pytest.fixture
def newer(comfy, monkeypatch):
    """ComfyUI's FLUX with such a module in its attention."""
    from comfy.ldm.flux.layers import SelfAttention

    inner = SelfAttention.__init__

    def init(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        self.comfy_attention = Preference()

    monkeypatch.setattr(SelfAttention, "__init__", init)


@pytest.fixture
def state(tiny_state):
    return dict(tiny_state) | {KEY: CONFIG}


def test_model_with_a_preference_is_quantized_and_keeps_it(comfy, newer, state, tmp_path):
    from comfyui_nibble.nodes.host.build import load, unpatched
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    full = comfy.sd.load_diffusion_model_state_dict(dict(state))
    made = NibbleQuantize.execute(full, "convrot", 0, False).args[0]
    assert len(list(made.packed_layers())) == 16
    layers, rest = unpatched(made)
    assert torch.equal(rest[KEY], CONFIG)
    assert KEY.removesuffix(".comfy_attention.config") not in layers
    assert relative_error(forward(full), forward(made)) < 0.2
    source, path = tmp_path / "full.safetensors", tmp_path / "packed.safetensors"
    save_file(state, source)
    nibble("quantize", source, path, "--method", "convrot")
    assert torch.equal(PackFile(path).tensor(KEY), CONFIG)
    loaded = load(path)
    assert torch.equal(loaded.model.diffusion_model.state_dict()[KEY], CONFIG)
    assert relative_error(forward(made), forward(loaded)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("leaf", ["weight", "qweight"])
def test_integer_weights_are_still_packed_ones(comfy, state, leaf, dtype):
    """Whatever put them there."""
    from comfyui_nibble.nodes.host.source import ModelSource, QuantizedSource

    full, name = comfy.sd.load_diffusion_model_state_dict(dict(state)), "single_blocks.1.linear2"
    layer = full.model.diffusion_model.get_submodule(name)
    del layer.weight
    layer.register_parameter(leaf, torch.nn.Parameter(torch.ones(256, 640, dtype=dtype), requires_grad=False))
    wanted = re.escape(
        f"this model is quantized already (1 packed tensors, first {name}.{leaf}); connect the "
        "full-precision model"
    )
    with pytest.raises(QuantizedSource, match=wanted):
        ModelSource(full)


def test_model_held_in_a_format_of_comfyui_is_refused_by_its_name(comfy):
    from comfyui_nibble.nodes.host.source import ModelSource, QuantizedSource

    state, name = load_file(tiny_flux.CHECKPOINT), "double_blocks.0.img_mlp.0"
    weight = state[f"{name}.weight"].float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    state[f"{name}.weight"] = (weight / scale).round().to(torch.int8)
    state |= {
        f"{name}.weight_scale": scale,
        f"{name}.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8),
    }
    with pytest.raises(
        QuantizedSource,
        match=re.escape(f"first {name}.weight in int8_tensorwise); connect the full-precision model"),
    ):
        ModelSource(comfy.sd.load_diffusion_model_state_dict(state))
