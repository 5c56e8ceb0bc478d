"""What convert_to_quant (silveroxides) writes under names of its own and is one of ComfyUI's formats: sources
with the same values."""

import json

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.kitchen.declared import parse
from comfyui_nibble.tests.assets.kitchen import NAME, SHAPES, K, N, weight
from comfyui_nibble.tests.assets.synthetic import random_state

pytestmark = pytest.mark.quick


def source(path, leaves, **conf):
    """The small FLUX with one layer in these tensors, opened as a source."""
    state = {k: t for k, t in random_state(SHAPES).items() if k != f"{NAME}.weight"}
    state |= {f"{NAME}.{leaf}": t.contiguous() for leaf, t in leaves.items()}
    state[f"{NAME}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    save_file(state, path)
    return Checkpoint(path)


def test_fp8_with_a_scale_a_row(tmp_path):
    """Of one dimension, as its `_convert_fp8_rowwise` leaves it."""
    scale = weight().abs().amax(1) / 448
    codes = (weight() / scale[:, None]).to(torch.float8_e4m3fn)
    leaves = {"weight": codes, "weight_scale": scale}
    opened = source(tmp_path / "rows.safetensors", leaves, format="float8_e4m3fn_rowwise")
    assert opened.reduced == "1 weights in float8_e4m3fn with a scale a row"
    assert opened.shapes[f"{NAME}.weight"] == (N, K)
    assert torch.equal(opened.get(f"{NAME}.weight"), (codes.float() * scale[:, None]).bfloat16())


def test_hybrid_mxfp8_is_mxfp8(tmp_path):
    """Its weight_scalar stands in for the block scales where a card has none; it is not in the weight."""
    parts = QuantizedTensor.from_float(weight(), "TensorCoreMXFP8Layout").state_dict("weight")
    parts["weight_scale"] = parts["weight_scale"].view(torch.uint8)
    plain = source(tmp_path / "mxfp8.safetensors", parts, format="mxfp8")
    hybrid = parts | {"weight_scalar": torch.tensor(0.5)}
    opened = source(tmp_path / "hybrid.safetensors", hybrid, format="hybrid_mxfp8", group_size=32)
    assert opened.reduced == plain.reduced == "1 weights in mxfp8"
    assert set(opened.shapes) == set(plain.shapes)
    assert torch.equal(opened.get(f"{NAME}.weight"), plain.get(f"{NAME}.weight"))


@pytest.mark.parametrize("name", [["mxfp8"], {"a": 1}, 3, None])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="unknown format"):
        parse({"format": name})
