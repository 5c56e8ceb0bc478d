"""A model that ComfyUI holds below 16 bit, quantized by the node."""

import re

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.assets.kitchen import marker
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.quant_core.formats.kitchen.test_dense import LAYOUTS
from comfyui_nibble.tests.support import relative_error


@pytest.mark.parametrize("old", [True, False])
def test_scaled_fp8_is_a_source(server, tiny_state, old):
    """ComfyUI holds such layers in fp8 with a scale; the fingerprint is that of the file, so calibrations
    serve node and command."""
    name = f"fp8_{'old' if old else 'new'}.safetensors"
    layer, state = "single_blocks.0.linear1", dict(tiny_state)
    scale = torch.tensor(0.0123)
    state[f"{layer}.weight"] = (
        (state[f"{layer}.weight"].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    )
    if old:
        state |= {f"{layer}.scale_weight": scale, "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    else:
        conf = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        state |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": conf}
    quantized_by_the_node(server, state, name, layer)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_are_a_source(server, tiny_state, kind):
    """nvfp4, mxfp8 and asym_w4a8_int8, as ComfyUI holds them; the report says what they have lost."""
    layer, state = "single_blocks.0.linear1", dict(tiny_state)
    held = QuantizedTensor.from_float(state.pop(f"{layer}.weight").float(), LAYOUTS[kind])
    conf = {"format": kind, "group_size": 16, "convrot_groupsize": 256}
    state |= held.state_dict(f"{layer}.weight") | {f"{layer}.comfy_quant": marker(conf)}
    report = quantized_by_the_node(server, state, f"{kind}.safetensors", layer)
    assert f"The source has 1 weights in {kind} (about " in report


def quantized_by_the_node(server, state, name, layer):
    path = server.base / "models" / "diffusion_models" / name
    save_file(state, path)
    graph = {
        "load": node("UNETLoader", unet_name=name, weight_dtype="default"),
        "quantize": node("NibbleQuantize", model=["load", 0], method="rtn", rank=0, gptq=False),
        "report": node("PreviewAny", source=["quantize", 1]),
        "save": node(
            "NibbleSaveModel", model=["quantize", 0], filename_prefix=f"diffusion_models/{path.stem}"
        ),
    }
    outputs = server.run(graph)
    saved = PackFile(
        server.base
        / "output"
        / "diffusion_models"
        / re.search(r"(\S+\.safetensors)", outputs["save"]["text"][0])[1]
    )
    assert saved.provenance["model"] == Checkpoint(path).fingerprint()
    assert not any(k.endswith(("comfy_quant", "weight_scale")) for k in saved.rest)
    assert relative_error(Checkpoint(path).get(f"{layer}.weight"), saved.layer(layer).dequantize()) < 0.2
    return outputs["report"]["text"][0]
