"""A file in fp8 in Nibble Load Diffusion Model: the layers of its blocks in int8, near what ComfyUI makes of
it, with LoRAs beside them."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.tests.host.inside import attached_weight, forward, load, module
from comfyui_nibble.tests.host.test_adapters import QKV, adapter, merged, with_lora
from comfyui_nibble.tests.support import relative_error


@pytest.fixture
def fp8(comfy, tiny_state, tmp_path):
    path = tmp_path / "fp8.safetensors"
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in tiny_state.items()}, path)
    return path


def test_it_draws_what_comfyui_draws_of_it(comfy, fp8, caplog):
    """The file is off the original by 3 %, int8 off the file by 0.7 %."""
    from comfyui_nibble.nodes.host.build import load as load_file

    made, stock = load_file(fp8), comfy.sd.load_diffusion_model(str(fp8))
    assert {layer.spec.precision for _, layer in made.packed_layers()} == {"W8A8", "W8A16"}
    assert relative_error(forward(stock), forward(made)) < 0.02
    assert "rounded to int8 behind a rotation (12 as W8A8, 4 as W8A16)" in caplog.text


def test_a_lora_beside_it_is_comfyuis_merge(comfy, fp8):
    from comfyui_nibble.nodes.host.build import load as load_file

    made = load_file(fp8)
    patched = load(with_lora(made, adapter("lora", QKV)))
    want = merged(patched, QKV)
    assert relative_error(want, attached_weight(module(patched, QKV))) < 1e-6
    assert relative_error(want, module(made, QKV).layer().dequantize()) > 0.01
