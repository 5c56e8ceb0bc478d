"""Each family's map against ComfyUI's own model class, built on the meta device: every linear layer is accounted for."""

import json
import subprocess
import sys

import pytest

from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.tests.host.conftest import COMFYUI

BUILD = """
import json, sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.ops
from comfy.ldm.flux.model import Flux
from comfy.ldm.pixart.pixartms import PixArtMS
operations = comfy.ops.disable_weight_init
if CASE == "flux":
    model = Flux(in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24,
                 depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
                 txt_ids_dims=[], device="meta", operations=operations)
else:
    model = PixArtMS(depth=2, device="meta", operations=operations)
linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
print(json.dumps([{k: list(v.shape) for k, v in model.state_dict().items()}, linear]))
"""

KEPT = {
    "flux": {
        "img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer",
        "guidance_in.in_layer", "guidance_in.out_layer", "final_layer.linear", "final_layer.adaLN_modulation.1",
    },
    "pixart": {
        "t_block.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear",
        "csize_embedder.mlp.0", "csize_embedder.mlp.2", "ar_embedder.mlp.0", "ar_embedder.mlp.2",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", ["flux", "pixart"])
def test_no_linear_layer_is_forgotten_or_named_twice(case):
    done = subprocess.run([sys.executable, "-c", f"CASE = {case!r}\n{BUILD}"], cwd=COMFYUI, capture_output=True, text=True, check=True)
    shapes, linear = json.loads(done.stdout.splitlines()[-1])
    shapes = {k: tuple(v) for k, v in shapes.items()}
    family = detect(shapes)
    assert family.name == case
    layers = [layer.name for layer in family.layers(shapes)]
    assert len(layers) == len(set(layers))
    assert set(linear) - set(layers) <= KEPT[case]
    assert set(layers) <= set(linear)
