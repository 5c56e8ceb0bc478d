"""The example workflows about other formats: a nunchaku file that is loaded, and an export that stock ComfyUI
loads; run small."""

import json
import re

import torch
from safetensors import safe_open

from comfyui_nibble.quant_core.formats.kitchen import native
from comfyui_nibble.quant_core.formats.kitchen.declared import HEADER
from comfyui_nibble.tests.codes import assert_apart_by_flips
from comfyui_nibble.tests.host import test_workflows_run
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.host.workflow_graphs import of_kind, pictures_are, shrunk, twin, with_latents
from comfyui_nibble.tests.support import relative_error

models = test_workflows_run.models  # the fixture


def test_nunchaku_runs(server, models):
    graph = with_latents(shrunk(twin("flux_nunchaku"), 128))
    [loader], [lora], [inspect] = (
        of_kind(graph, kind) for kind in ("NibbleLoadDiffusionModel", "LoraLoaderModelOnly", "NibbleInspect")
    )
    bare = {lora: graph[lora] | {"inputs": graph[lora]["inputs"] | {"strength_model": 0.0}}}
    full = {loader: node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default")}

    def sampled(changes):
        outputs = server.run(graph | changes)
        pictures_are(server, outputs, graph, 128)
        return server.latents(outputs, "latents_LoraLoaderModelOnly"), outputs

    back = node(
        "NibbleExportModel",
        model=[loader, 0],
        format="nunchaku",
        filename_prefix="back",
        lossy=False,
        replacement="int8",
    )
    with_lora, outputs = sampled({"back": back})
    assert "13 layers read back bit for bit" in outputs["back"]["text"][0]
    assert "kind: nunchaku SVDQuant INT4" in outputs[inspect]["text"][0]
    assert "quantized layers: 13" in outputs[inspect]["text"][0]
    assert "notes" not in outputs[inspect]["text"][0]
    without = sampled(bare)[0]
    assert relative_error(sampled(full)[0], with_lora) < 0.02  # 0.014
    assert relative_error(sampled(full | bare)[0], without) < 0.02  # 0.012
    assert relative_error(with_lora, without) > 0.03  # 0.043


def test_export_native_runs(server, models):
    graph = with_latents(shrunk(twin("flux_export_native"), 128))
    outputs = server.run(graph)
    pictures_are(server, outputs, graph, 128)
    report, written = (outputs[key]["text"][0] for key in of_kind(graph, "PreviewAny"))
    assert "13 layers" in report
    assert "13 of 13 quantized layers are written as they are, nothing is lost" in written
    assert "13 layers read back bit for bit" in written
    name = re.search(r"(flux1-dev-native\S+\.safetensors)", written)[1]
    with safe_open(server.base / "output" / "diffusion_models" / name, "pt") as file:
        assert {layer["format"] for layer in json.loads(file.metadata()[HEADER])["layers"].values()} <= set(
            native.FORMATS
        )

    [quantize] = of_kind(graph, "NibbleQuantize")
    ends = ("PreviewAny", "NibbleExportModel", "NibbleCompare")
    rest = {key: n for key, n in graph.items() if n["class_type"] not in ends and key != "latents_UNETLoader"}
    loaded = lambda loader: server.latents(server.run(rest | {quantize: loader}), "latents_native")
    stock = loaded(node("UNETLoader", unet_name=name, weight_dtype="default"))
    ours = loaded(node("NibbleLoadDiffusionModel", model_name=name))
    full, quantized = (server.latents(outputs, f"latents_{maker}") for maker in ("UNETLoader", "native"))
    assert torch.equal(ours, quantized)
    assert (
        0 < relative_error(full, quantized) < 0.002
    )  # 0.0010: of the random layers none reaches 20 dB at 4 bits
    assert_apart_by_flips(full, quantized, stock)  # comfy-kitchen's own arithmetic
