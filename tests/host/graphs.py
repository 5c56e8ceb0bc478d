"""API graphs for the host tests."""

import json

from comfyui_nibble.tests.codes import EDGE


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def sampling(model, positive, latent, seed=3, steps=8, cfg=1.0, negative=None):
    return node(
        "KSampler", model=model, positive=positive, negative=negative or positive, latent_image=latent,
        seed=seed, steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip


FLUX_TINY = {
    "model": "tiny_flux.safetensors",
    "calibration": node(
        "TestCaptions",
        captions="small purple ring top on striped yellow background\nsmall yellow square left on striped green "
        "background\n"
        "large white diamond right on checked black background\nlarge blue triangle bottom on plain white "
        "background",
    ),
    "prompt": node("TestCaptions", captions="large red circle center on plain blue background"),
    "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
}
PIXART = {
    "model": "pixart.safetensors",
    "calibration": node("TestConditioning", tokens=12, dim=4096, pooled_dim=0, seed=1, entries=2),
    "prompt": node("TestConditioning", tokens=12, dim=4096, pooled_dim=0, seed=2, entries=1),
    "latent": node("EmptyLatentImage", width=288, height=288, batch_size=1),
}
FLUX_WIDE = {
    "model": "flux_3072.safetensors",
    "calibration": node("TestConditioning", tokens=16, dim=4096, pooled_dim=768, seed=1, entries=2),
    "prompt": node("TestConditioning", tokens=16, dim=4096, pooled_dim=768, seed=2, entries=1),
    "latent": node("EmptySD3LatentImage", width=256, height=256, batch_size=1),
}


def quantize_graph(
    case, method="svdquant_r", samples=4, steps=4, prefix="diffusion_models/test", sample_steps=8, **calibrate
):
    """Load -> calibrate -> quantize -> save, and sample with both models."""
    settings = {
        "sampler_name": "euler",
        "scheduler": "simple",
        "steps": steps,
        "cfg": 1.0,
        "seed": 1,
        "samples": samples,
        "memory_gb": 4.0,
        "second_moments": True,
    }
    return {
        "load": node("UNETLoader", unet_name=case["model"], weight_dtype="default"),
        "prompts": case["calibration"],
        "latent": case["latent"],
        "prompt": case["prompt"],
        "calibrate": node("NibbleCalibrate", model=["load", 0], latent_image=["latent", 0],
        **{"conditioning.positive0": ["prompts", 0]}, **(settings | calibrate)),
        "quantize": node("NibbleQuantize", model=["load", 0], calibration=["calibrate", 0], method=method,
        rank=32, gptq=True),
        "report": node("PreviewAny", source=["quantize", 1]),
        "save": node("NibbleSaveModel", model=["quantize", 0], filename_prefix=prefix),
        "full": sampling(["load", 0], ["prompt", 0], ["latent", 0], steps=sample_steps),
        "full_latent": node("SaveLatent", samples=["full", 0], filename_prefix="full"),
        "quantized": sampling(["quantize", 0], ["prompt", 0], ["latent", 0], steps=sample_steps),
        "quantized_latent": node("SaveLatent", samples=["quantized", 0], filename_prefix="quantized"),
    }  # fmt: skip


def load_graph(case, name, sample_steps=8, **extra):
    """Load a saved file and sample; `extra` nodes may stand between ("model" is what the sampler takes)."""
    graph = {
        "load": node("NibbleLoadDiffusionModel", model_name=name),
        "latent": case["latent"],
        "prompt": case["prompt"],
        "sample": sampling(["load", 0], ["prompt", 0], ["latent", 0], steps=sample_steps),
        "out": node("SaveLatent", samples=["sample", 0], filename_prefix="loaded"),
    }
    graph |= extra
    if "model" in extra:
        graph["sample"]["inputs"]["model"] = ["model", 0]
    return graph


def keep_codes(graph, sampler="sample", name="codes"):
    """The graph with the activation codes of a sampler's model kept under a name, for `take_codes` of a later
    graph."""
    graph[f"{sampler}_kept"] = node("TestKeepCodes", model=graph[sampler]["inputs"]["model"], name=name)
    graph[sampler]["inputs"]["model"] = [f"{sampler}_kept", 0]
    return graph


def take_codes(graph, sampler="sample", positive="codes", negative="", start=0):
    """The graph with a sampler's model on codes kept before: of `positive`, one name for each image of the
    batch, and `negative`, from the network's call `start` on. See `took_codes`."""
    stock = graph[sampler]["inputs"]
    graph[f"{sampler}_took"] = node(
        "TestTakeCodes", model=stock["model"], positive=positive, negative=negative, start=start, name=sampler
    )
    graph[f"{sampler}_told"] = node("TestCodesTaken", samples=[sampler, 0], name=sampler)
    graph[f"{sampler}_said"] = node("PreviewAny", source=[f"{sampler}_told", 0])
    stock["model"] = [f"{sampler}_took", 0]
    return graph


def took_codes(outputs, sampler="sample", edge=EDGE):
    """Asserts that the sampler's own values give the codes that it took, or lie on the edge."""
    said = json.loads(outputs[f"{sampler}_said"]["text"][0])
    assert said["codes"] > 0
    assert said["edge"] < edge, said
