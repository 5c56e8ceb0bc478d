"""A model on a CPU with int8 instructions: held in 8 bits from loading on, saved as it was, no further from
full precision, and open to LoRAs."""

import pytest
import torch

from comfyui_nibble.kernels.at_load import SWITCH
from comfyui_nibble.kernels.target import target_of
from comfyui_nibble.tests.host.inside import forward, load, module, sample
from comfyui_nibble.tests.host.test_adapters import QKV, adapter, with_lora
from comfyui_nibble.tests.support import relative_error

MLP = "diffusion_model.double_blocks.0.img_mlp.2"
HERE = bool(target_of("cpu").arch)


@pytest.fixture(scope="module")
def stored(tiny_packed):
    """The small FLUX with its layers as they are stored: SVDQuant, scales of groups."""
    return tiny_packed()


@pytest.fixture(scope="module")
def eight(tiny_packed, one_thread):
    """The same in the form that this machine runs, which is that of `stored` where it has no such
    instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        yield tiny_packed()


def test_layers_are_held_in_8_bits(eight):
    found = {layer.spec.precision for _, layer in load(eight).packed_layers()}
    assert found == ({"W8A8", "W8A16"} if HERE else {"W4A4", "W4A16"})


def test_is_no_further_from_full_precision(stored, eight, full):
    want = forward(full)
    assert relative_error(want, forward(eight)) < 1.02 * relative_error(want, forward(stored))


def test_what_is_saved_is_what_was_stored(stored, eight):
    from comfyui_nibble.nodes.host.contents import take_apart

    before, after = (take_apart(patcher).layers for patcher in (stored, eight))
    assert before.keys() == after.keys()
    for name, layer in before.items():
        assert after[name].spec == layer.spec
        for key, tensor in layer.tensors.items():
            assert torch.equal(after[name].tensors[key], tensor)


def test_bias_is_the_model_s_own(eight, full):
    """After a GELU it holds a correction for the shift, which goes with the rounded weights."""
    layer = module(load(eight), MLP)
    assert any(part.activation.shift for part in layer.spec.parts)
    assert relative_error(module(full, MLP).bias.float(), layer.convert_bias(layer.bias)) < 3e-3


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_lora_acts(stored, eight, kind):
    effect = lambda patcher: forward(with_lora(patcher, adapter(kind, QKV))) - forward(patcher)
    a, b = effect(stored).flatten(), effect(eight).flatten()
    assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.95
    load(eight), load(stored)


def test_samples(stored, eight):
    assert relative_error(sample(stored), sample(eight)) < 0.1
