"""The small PixArt in a real ComfyUI: loaded by its own loader, told the width that its detection takes for
1152, sampled with core's nodes as outside of ComfyUI, and quantized."""

import shutil

import pytest
import torch

from comfyui_nibble.quant_core.evaluation.demo import metrics, shields
from comfyui_nibble.quant_core.evaluation.demo.shield_pixart import MODEL
from comfyui_nibble.tests.host.graphs import node, sampling
from comfyui_nibble.tests.host.test_landscapes import picture

STEPS, SEED = 20, 3


@pytest.fixture(scope="module")
def pictures(server):
    """{"full" or "quantized": what ComfyUI draws of the first caption}."""
    shutil.copy(MODEL.checkpoint, server.base / "models" / "diffusion_models" / "shields.safetensors")
    model = ["model", 0]
    graph = {
        "model": node("UNETLoader", unet_name="shields.safetensors", weight_dtype="default"),
        "prompt": node("TestShieldCaptions", captions=shields.CAPTIONS[0]),
        "prompts": node("TestShieldCaptions", captions="\n".join(shields.CAPTIONS[1:])),
        "latent": node("EmptyLatentImage", width=8 * 34, height=8 * 34, batch_size=1),
        "calibrate": node("NibbleCalibrate", model=model, latent_image=["latent", 0], sampler_name="euler",
        scheduler="normal", steps=8, cfg=1.0, seed=1, samples=7, memory_gb=4.0, second_moments=True,
        **{"conditioning.positive0": ["prompts", 0]}),
        "quantize": node("NibbleQuantize", model=model, calibration=["calibrate", 0], method="svdquant_r",
        rank=32, gptq=True),
    }  # fmt: skip
    for name, made in (("full", model), ("quantized", ["quantize", 0])):
        sampled = sampling(made, ["prompt", 0], ["latent", 0], seed=SEED, steps=STEPS)
        sampled["inputs"]["scheduler"] = "normal"
        graph |= {
            name: sampled,
            f"{name}_picture": node("TestShieldDecode", samples=[name, 0]),
            f"{name}_saved": node(
                "SaveImage", images=[f"{name}_picture", 0], filename_prefix=f"shield_{name}"
            ),
        }
    server.run(graph)
    names = ("full", "quantized")
    return {name: picture(server.base / "output" / f"shield_{name}_00001_.png") for name in names}


def test_core_nodes_draw_what_is_drawn_outside(pictures):
    outside = shields.decode(MODEL.sample(MODEL.load(), shields.CAPTIONS[:1], STEPS, SEED))[0]
    assert pictures["full"].shape == (68, 68, 3)
    assert metrics.psnr_db(outside, pictures["full"], 1.0) > 40


def test_quantized_in_comfyui_it_draws_nearly_the_same(pictures):
    psnr = metrics.psnr_db(pictures["full"], pictures["quantized"], 1.0)
    assert 20 < psnr < 60
    assert not torch.equal(pictures["full"], pictures["quantized"])
