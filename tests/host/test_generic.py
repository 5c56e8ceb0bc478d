"""A model that the pack has no map of (LTX-Video, small and random): calibrate, quantize, save, load and
sample by the generic rules."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.families import GENERIC, detect
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.host.test_main_job import run_both

CASE = {
    "model": "ltxv.safetensors",
    "calibration": node("TestConditioning", tokens=12, dim=4096, pooled_dim=0, seed=1, entries=2, mask=1),
    "prompt": node("TestConditioning", tokens=12, dim=4096, pooled_dim=0, seed=2, entries=1, mask=1),
    "latent": node("EmptyLTXVLatentVideo", width=256, height=256, length=17, batch_size=1),
}


@pytest.fixture(scope="module")
def ltxv(server, comfy):
    """Width 256 (ComfyUI takes 32 heads and reads their width from the weights), 3 blocks."""
    import comfy.ops
    from comfy.ldm.lightricks.model import LTXVModel

    torch.manual_seed(0)
    model = LTXVModel(
        num_layers=3,
        attention_head_dim=8,
        cross_attention_dim=256,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    for name, p in model.named_parameters():
        fan = p.shape[-1] if p.ndim > 1 else 1
        torch.nn.init.ones_(p) if p.ndim == 1 and name.endswith("weight") else torch.nn.init.normal_(
            p, std=fan**-0.5 if p.ndim > 1 else 0.02
        )
    state = {k: v.detach().bfloat16() for k, v in model.state_dict().items()}
    save_file(state, server.base / "models" / "diffusion_models" / CASE["model"])
    return {k: tuple(v.shape) for k, v in state.items()}


def test_main_job(server, ltxv):
    assert detect(ltxv) is GENERIC
    outputs, error, path = run_both(
        server, CASE, samples=4, steps=3, prefix="diffusion_models/ltxv", sample_steps=4
    )
    assert error < 0.2
    pack = PackFile(path)
    assert pack.family == "generic"
    rests = {name.split(".", 2)[2] for name in pack.specs if name.startswith("transformer_blocks.")}
    assert {name for name in pack.specs if not name.startswith("transformer_blocks.")} == {
        "adaln_single.linear"
    }  # shared modulation
    assert rests == {f"attn{i}.{n}" for i in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out.0")} | {
        "ff.net.0.proj",
        "ff.net.2",
    }
    # q, k and v read one tensor; the text of all blocks is one tensor too.
    folder = next((server.base / "output" / "nibble_calibration").glob("generic-*"))
    seen = Calibration(folder).meta["observed"]
    assert seen["shared"]["transformer_blocks.1.attn1.to_v"] == "transformer_blocks.1.attn1.to_q"
    assert {seen["shared"][f"transformer_blocks.{i}.attn2.to_v"] for i in range(3)} == {
        "transformer_blocks.0.attn2.to_k"
    }
    # A layer behind a GELU is found by what its input looks like.
    assert pack.specs["transformer_blocks.0.ff.net.2"].parts[0].activation.unsigned
    assert "Generic, SVDQuant with a Hadamard rotation" in outputs["report"]["text"][0]
