"""Nibble Export Model and Nibble Inspect over HTTP; what they write loads with Nibble Load Diffusion Model
and samples the same."""

import re
from pathlib import Path

import pytest
import torch

from comfyui_nibble.quant_core.formats.detect import kind_of
from comfyui_nibble.tests.host.graphs import FLUX_TINY, load_graph, node, sampling
from comfyui_nibble.tests.host.server import GraphError
from comfyui_nibble.tests.support import relative_error


def exported(server, method, to, lossy, prefix, **settings):
    """(outputs, name of the file)"""
    graph = {
        "load": node("UNETLoader", unet_name=FLUX_TINY["model"], weight_dtype="default"),
        "latent": FLUX_TINY["latent"],
        "prompt": FLUX_TINY["prompt"],
        "quantize": node("NibbleQuantize", model=["load", 0], method=method, rank=16, gptq=False),
        "export": node(
            "NibbleExportModel",
            model=["quantize", 0],
            format=to,
            filename_prefix=f"diffusion_models/{prefix}",
            lossy=lossy,
            replacement="int8",
        ),
        "said": node("PreviewAny", source=["export", 1]),
        "sample": sampling(["quantize", 0], ["prompt", 0], ["latent", 0], steps=4),
        "out": node("SaveLatent", samples=["sample", 0], filename_prefix="quantized"),
        "full": sampling(["load", 0], ["prompt", 0], ["latent", 0], steps=4),
        "full_out": node("SaveLatent", samples=["full", 0], filename_prefix="full"),
    }
    outputs = server.run(graph)
    return outputs, Path(re.search(r"(\S+\.safetensors)", outputs["export"]["text"][0])[1]).name


def loaded(server, name):
    return server.latents(server.run(load_graph(FLUX_TINY, name, sample_steps=4)), "out")


@pytest.mark.parametrize(
    ("method", "to", "lossy", "exact"),
    [("convrot", "native", True, 12), ("svdquant", "kitchen", True, 10), ("svdquant", "nibble", False, 16)],
)
def test_export_and_load_again(server, method, to, lossy, exact):
    outputs, name = exported(server, method, to, lossy, f"{method}-{to}")
    said = outputs["said"]["text"][0]
    assert f"{exact} layers read back bit for bit" in said
    path = server.base / "output" / "diffusion_models" / name
    assert kind_of(path) == ("nibble" if to == "nibble" else "kitchen")
    full, quantized, again = (
        server.latents(outputs, "full_out"),
        server.latents(outputs, "out"),
        loaded(server, name),
    )
    if not lossy:
        assert torch.equal(again, quantized)
    # A layer that is replaced moves codes of all behind it: the error is another one of the same size.
    assert relative_error(full, again) < 1.3 * relative_error(full, quantized), (
        relative_error(full, again),
        relative_error(full, quantized),
    )


def test_a_loss_must_be_allowed(server):
    with pytest.raises(GraphError, match="0 of 16 quantized layers are written as they are"):
        exported(server, "svdquant", "native", False, "refused")
    assert not list((server.base / "output" / "diffusion_models").glob("refused*"))


def test_inspect(server):
    outputs, name = exported(server, "native", "native", False, "inspected")
    text = server.run({"inspect": node("NibbleInspect", model_name=name)})["inspect"]["text"][0]
    assert "stock ComfyUI: loads it with Load Diffusion Model" in text
    assert "this machine: no GPU, it runs on the CPU" in text
    assert torch.equal(server.latents(outputs, "out"), loaded(server, name))
    text = server.run({"inspect": node("NibbleInspect", model_name=FLUX_TINY["model"])})["inspect"]["text"][0]
    assert "kind: full-precision checkpoint" in text
