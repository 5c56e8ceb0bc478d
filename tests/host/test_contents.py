"""A model taken apart: what each kind of weight is read as, and what happens first to models on a card or
under dynamic memory.

The two last need a GPU to happen by themselves; here only the question whether they have happened is answered
for ComfyUI.
"""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.tests.host.inside import load

QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture
def full(comfy, tiny_state):
    return comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))


@pytest.fixture
def take_apart(comfy):
    from comfyui_nibble.nodes.host.contents import take_apart

    return take_apart


@pytest.fixture
def refused(comfy):
    from comfyui_nibble.nodes.host.source import QuantizedSource

    return QuantizedSource


def comfy_names(state):
    """ComfyUI calls the scales of FLUX's norms weights."""
    return {k.replace("_norm.scale", "_norm.weight"): t for k, t in state.items()}


def test_stock_model(take_apart, full, tiny_state):
    contents = take_apart(full)
    assert contents.layers == {}
    assert contents.info == {}
    assert contents.shapes == {k: tuple(t.shape) for k, t in comfy_names(tiny_state).items()}
    assert contents.nbytes == sum(4 * t.numel() for t in tiny_state.values())  # fp32 on a CPU
    for key, tensor in full.model.diffusion_model.state_dict().items():
        assert contents.rest[key].data_ptr() == tensor.data_ptr()


def test_packed_model(take_apart, tiny_packed, tiny_state):
    model = tiny_packed()
    contents = take_apart(model)
    assert contents.shapes == {k: tuple(t.shape) for k, t in comfy_names(tiny_state).items()}
    assert len(contents.layers) == 16
    assert contents.nbytes == sum(t.nbytes for t in model.model.diffusion_model.state_dict().values())
    assert contents.info is model.attachments["nibble"]


def test_fp8_weights_become_bf16(comfy, take_apart, tiny_state):
    """Left in fp8 they could make ComfyUI run the result's other layers in fp8 too."""
    fp8 = comfy.sd.load_diffusion_model_state_dict(
        dict(tiny_state), model_options={"dtype": torch.float8_e4m3fn}
    )
    contents = take_apart(fp8)
    assert fp8.model.diffusion_model.state_dict()[f"{QKV}.weight"].dtype == torch.float8_e4m3fn
    for key, tensor in contents.rest.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, comfy_names(tiny_state)[key].to(torch.float8_e4m3fn).bfloat16())


def scaled(comfy, tiny_state):
    """The model with one layer in ComfyUI's scaled fp8, scale 2^-10, multiplied in full precision."""
    state = tiny_state | {
        f"{QKV}.weight": (tiny_state[f"{QKV}.weight"].float() * 1024).to(torch.float8_e4m3fn)
    }
    state |= {
        f"{QKV}.scale_weight": torch.tensor(2.0**-10),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    return comfy.sd.load_diffusion_model_state_dict(state)


def test_scaled_fp8_becomes_real_values(comfy, take_apart, tiny_state):
    contents = take_apart(scaled(comfy, tiny_state))
    assert contents.shapes == {
        k: tuple(t.shape) for k, t in comfy_names(tiny_state).items()
    }  # no scales, no markers
    fp8 = (tiny_state[f"{QKV}.weight"].float() * 1024).to(torch.float8_e4m3fn)
    assert torch.equal(contents.rest[f"{QKV}.weight"].float(), fp8.float() / 1024)
    assert torch.equal(contents.rest[f"{QKV}.bias"].float(), tiny_state[f"{QKV}.bias"].float())


@pytest.fixture
def smoothed(comfy, tiny_state):
    """`scaled`, with a layer whose input ComfyUI multiplies by 1, 2, 4 and 8 in turns: (model, layer)."""
    model = scaled(comfy, tiny_state)
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    factors = 2.0 ** (torch.arange(256) % 4)
    layer.register_parameter("pre_quant_scale", torch.nn.Parameter(factors, requires_grad=False))
    return model, layer


def test_smoothing_of_fp8_goes_into_its_weight(smoothed, take_apart, tiny_state):
    rest = take_apart(smoothed[0]).rest
    fp8 = (tiny_state[f"{QKV}.weight"].float() * 1024).to(torch.float8_e4m3fn)
    assert torch.equal(rest[f"{QKV}.weight"].float(), fp8.float() / 1024 * smoothed[1].pre_quant_scale)
    assert f"{QKV}.pre_quant_scale" not in rest


def test_smoothed_activations_of_other_formats_are_refused(smoothed, take_apart, refused):
    smoothed[1].quant_format = "int8_tensorwise"
    with pytest.raises(
        refused,
        match=rf"{QKV}.pre_quant_scale: weights of a model that smooths its activations cannot be read",
    ):
        take_apart(smoothed[0])


def test_weights_packed_by_others_are_refused(take_apart, full, refused):
    full.model.diffusion_model.img_in.weight = torch.nn.Parameter(
        torch.zeros(256, 32, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(
        refused, match=r"img_in.weight: packed weights of another kind than Nibble's \(torch.uint8\)"
    ):
        take_apart(full)


def patched(model):
    """A loaded clone with a weight difference on the layer."""
    clone = model.clone()
    clone.add_patches({f"diffusion_model.{QKV}.weight": ("diff", (torch.ones(768, 256),))})
    load(clone)
    assert list(model.backup) == [f"diffusion_model.{QKV}.weight"]
    return clone


def test_a_model_on_a_card_is_unloaded_with_its_clones(take_apart, full, tiny_state, monkeypatch):
    clone = patched(full)
    monkeypatch.setattr(full, "current_loaded_device", lambda: torch.device("cuda"))
    contents = take_apart(full)
    assert full.backup == {}
    assert torch.equal(contents.rest[f"{QKV}.weight"], tiny_state[f"{QKV}.weight"].float())
    # On the CPU it stays as it is, and the original weight is read all the same.
    load(clone)
    assert torch.equal(take_apart(clone).rest[f"{QKV}.weight"], tiny_state[f"{QKV}.weight"].float())
    assert len(clone.backup) == 1


def test_a_dynamic_model_is_read_again(comfy, take_apart, tiny_state, tmp_path, monkeypatch):
    save_file(tiny_state, tmp_path / "tiny.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "tiny.safetensors"))
    model.add_patches({f"diffusion_model.{QKV}.weight": ("diff", (torch.ones(768, 256),))})
    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    contents = take_apart(model)
    assert contents.patcher.model is not model.model
    assert not contents.patcher.is_dynamic()
    assert list(contents.patcher.patches) == [f"diffusion_model.{QKV}.weight"]
    assert torch.equal(contents.rest[f"{QKV}.weight"], tiny_state[f"{QKV}.weight"].float())
