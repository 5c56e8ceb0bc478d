"""ComfyUI's asym_w4a8_int8 layers are W8A8 behind a rotation, to the last code."""

import pytest
import torch
from comfy_kitchen.backends.eager.w4a8_int8 import w4a8_int8_linear
from comfy_kitchen.tensor import QuantizedTensor

from comfyui_nibble.quant_core.convert.inspect import describe
from comfyui_nibble.quant_core.formats.detect import FULL, kind_of, open_quantized
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.kitchen import NAME, tokens, weight
from comfyui_nibble.tests.codes import layer_error
from comfyui_nibble.tests.support import relative_error

pytestmark = pytest.mark.quick
CONF = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256}


def stored(**options):
    """comfy-kitchen's tensors of the test's weight."""
    return QuantizedTensor.from_float(weight(), "AsymW4A8Int8Layout", **options).state_dict("weight")


@pytest.mark.parametrize("options", [{}, {"codebook": False}], ids=str)
def test_outputs_are_comfy_kitchens(write, state, options):
    parts = stored(**options)
    layer, x = open_quantized(write(parts, CONF)).layer(NAME), tokens()
    assert layer.spec.describe() == "W8A8 per channel H256"
    y = w4a8_int8_linear(
        x,
        parts["weight"],
        parts["weight_s_rel"],
        parts["weight_s_channel"],
        parts.get("weight_codebook"),
        bias=state[f"{NAME}.bias"].float(),
        out_dtype=torch.float32,
    )
    assert layer_error(y, layer(x), x, layer.spec, layer.tensors) < 1e-5
    assert relative_error(y, layer(x)) < 1e-3


def test_full_precision_products_leave_x_alone(write):
    model = open_quantized(write(stored(), CONF | {"full_precision_matrix_mult": True}))
    assert model.specs[NAME].describe() == "W8A16 per channel H256"


def test_inspect(write):
    said = describe(write(stored(), CONF), "cpu")
    assert said["kind"] == "ComfyUI quantized model (1 asym_w4a8_int8)"
    assert said["stock ComfyUI"] == "loads it with Load Diffusion Model"


def test_a_correction_is_refused_with_the_reason(write):
    path = write(stored(symmetric=False, codebook=False), CONF)
    assert kind_of(path) == FULL  # a source
    with pytest.raises(CheckpointError, match="1 asym_w4a8_int8.*ComfyUI leaves out their weight_correction"):
        KitchenFile(path)
