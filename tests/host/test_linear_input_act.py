"""ComfyUI after 0.33 computes a linear layer behind an activation itself under --fast fp16_accumulation, from
the weight that it casts."""

import pytest
import torch

from comfyui_nibble.tests.assets.synthetic import random_state, wan_shapes
from comfyui_nibble.tests.support import relative_error


@pytest.fixture
def newer(comfy, monkeypatch):
    """That `linear_input_act`, with PyTorch's switch on. Returns the layers that it computed without a
    call."""
    import comfy.ops

    computed, matmul = [], torch.backends.cuda.matmul

    def linear_input_act(layer, x, input_act):
        x = comfy.ops.INPUT_ACT_EAGER[input_act](x)
        if not matmul.allow_fp16_accumulation or getattr(layer, "_full_precision_mm", False):
            return layer(x)
        computed.append(layer)
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
        y = torch.nn.functional.linear(x, weight, bias)
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return y

    monkeypatch.setattr(comfy.ops, "linear_input_act", linear_input_act)
    was, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    yield computed
    matmul.allow_fp16_accumulation = was


@pytest.fixture(scope="module")
def wan(comfy):
    return comfy.sd.load_diffusion_model_state_dict(random_state(wan_shapes()))


def predicted(patcher):
    comfy_noise, context = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 1, 8, 8, generator=comfy_noise), torch.randn(1, 12, 4096, generator=context)
    with torch.no_grad():
        return patcher.model.diffusion_model(x, torch.full((1,), 500.0), text)


def test_calibration_sees_the_inputs_of_all_layers(newer, wan, one_thread, tmp_path):
    import folder_paths

    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    folder_paths.set_output_directory(str(tmp_path))
    prompts = [[torch.randn(1, 12, 4096, generator=torch.Generator().manual_seed(i)), {}] for i in range(2)]
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    done = NibbleCalibrate.execute(
        wan, {"positive0": prompts}, latent, "euler", "simple", 2, 1.0, 0, 2, 4.0, False
    ).args[0]
    assert newer == []
    assert done.get("blocks.0.ffn.2").count > 0
    assert torch.backends.cuda.matmul.allow_fp16_accumulation


def test_packed_layers_stay_on_their_kernels(newer, wan, one_thread):
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    full = predicted(wan)
    (layer,) = newer
    assert layer is wan.model.diffusion_model.blocks[0].ffn[2]
    made = NibbleQuantize.execute(wan, "rtn", 0, False).args[0]
    quantized = predicted(made)
    assert len(newer) == 1
    assert relative_error(full, quantized) < 0.2
    packed = made.model.diffusion_model.blocks[0].ffn[2]
    packed._full_precision_mm = False  # a ComfyUI without that way out
    by_cast = predicted(made)
    assert newer[1] is packed
    assert relative_error(full, by_cast) < 0.2
    assert 0 < relative_error(quantized, by_cast) < 0.05  # the 4 bits of one layer's x
