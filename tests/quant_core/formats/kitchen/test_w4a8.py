"""ComfyUI's asym_w4a8_int8 layers are W8A8 behind a rotation, to the last code."""

import pytest
import torch
from comfy_kitchen.backends.eager.w4a8_int8 import w4a8_int8_linear
from comfy_kitchen.tensor import QuantizedTensor

from comfyui_nibble.kernels.operator.transforms import rotate
from comfyui_nibble.quant_core.convert.inspect import describe
from comfyui_nibble.quant_core.formats.detect import FULL, kind_of, open_quantized
from comfyui_nibble.quant_core.formats.kitchen.declared import Declaration
from comfyui_nibble.quant_core.formats.kitchen.dense import weight_of
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


def six_bits(group=16):
    """Tensors as comfy-kitchen 0.2.40 stores 6 bits: (they, the whole numbers of int8). 0.2.31 has none."""
    n, k = weight().shape
    g = torch.Generator().manual_seed(3)
    codes = torch.randint(1, 64, (n, k), generator=g)
    low, high = codes & 15, codes >> 4
    planes = low[:, 0::2] | low[:, 1::2] << 4, sum(high[:, i::4] << 2 * i for i in range(4))
    relative = (1 + 3 * torch.rand(n, k // group, generator=g)).to(torch.float8_e4m3fn)
    levels = (codes - 32) * relative.float().repeat_interleave(group, -1)
    return {
        "weight": torch.cat(planes, 1).to(torch.uint8).view(torch.int8),
        "weight_s_rel": relative,
        "weight_s_channel": torch.rand(n, generator=g) / 1000,
    }, levels.round().clamp(-127, 127)


def test_codes_of_6_bits(write):
    parts, levels = six_bits()
    layer = open_quantized(write(parts, CONF)).layer(NAME)
    assert layer.spec.describe() == "W8A8 per channel H256"
    assert torch.equal(layer.tensors["weight"].float(), levels)
    real = weight_of(Declaration("asym_w4a8_int8", 256, group=16), parts.get)
    want = rotate(levels * parts["weight_s_channel"][:, None], 256)
    assert torch.equal(real, want.bfloat16())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"weight": torch.zeros(256, 160, dtype=torch.int8)},
            "expected 512 or 768 bytes a row, .* found 160",
        ),
        ({"weight_codebook": torch.zeros(64)}, "weight_codebook: expected none with codes of 6 bits"),
    ],
    ids=["width", "table"],
)
def test_rows_of_neither_are_named(write, changed, message):
    parts, _ = six_bits()
    with pytest.raises(CheckpointError, match=message):
        open_quantized(write(parts | changed, CONF))


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
