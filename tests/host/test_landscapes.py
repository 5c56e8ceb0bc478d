"""The model of landscapes in a real ComfyUI: loaded by its own loader, with core's nodes for text, sampling
and decoding."""

import shutil

import torch

from comfyui_nibble.quant_core.evaluation.demo import landscapes, metrics
from comfyui_nibble.quant_core.evaluation.demo.landscape_flux import MODEL
from comfyui_nibble.tests.host.graphs import node, sampling

SCENE = landscapes.Scene("hills", "day", "left", "meadow", "one", "one")


def test_core_nodes_draw_a_landscape(server):
    shutil.copy(MODEL.checkpoint, server.base / "models" / "diffusion_models" / "landscape_flux.safetensors")
    graph = {
        "model": node("UNETLoader", unet_name="landscape_flux.safetensors", weight_dtype="default"),
        "clip": node("TestLandscapeTextEncoder"),
        "vae": node("TestLandscapeVAE"),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text=SCENE.caption),
        "same": node("TestLandscapeCaptions", captions=SCENE.caption),
        "latent": node("EmptySD3LatentImage", width=256, height=256, batch_size=1),
    }
    for name, prompt in (("core", "prompt"), ("test", "same")):
        graph[f"{name}_sampled"] = sampling(["model", 0], [prompt, 0], ["latent", 0], steps=12)
    graph["core_picture"] = node("VAEDecode", samples=["core_sampled", 0], vae=["vae", 0])
    graph["test_picture"] = node("TestLandscapeDecode", samples=["test_sampled", 0])
    for name in ("core", "test"):
        graph[f"{name}_saved"] = node(
            "SaveImage", images=[f"{name}_picture", 0], filename_prefix=f"landscape_{name}"
        )
    server.run(graph)
    core, test = (picture(server.base / "output" / f"landscape_{n}_00001_.png") for n in ("core", "test"))
    assert torch.equal(core, test)
    want = torch.from_numpy(landscapes.draw(SCENE))
    assert core.shape == want.shape == (128, 128, 3)
    assert metrics.psnr_db(want, core, 1.0) > 30


def picture(path):
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path)).astype(np.float32) / 255)
