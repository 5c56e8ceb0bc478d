"""Calibrate -> quantize -> save, then load -> sample, over HTTP in a real ComfyUI."""

import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.calibration.file import read_meta
from comfyui_nibble.quant_core.evaluation.demo.outliers import add_outliers
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.graphs import (
    FLUX_TINY,
    FLUX_WIDE,
    PIXART,
    load_graph,
    node,
    quantize_graph,
    sampling,
)
from comfyui_nibble.tests.support import relative_error


def saved_name(outputs):
    return Path(re.search(r"(\S+\.safetensors)", outputs["save"]["text"][0])[1]).name


def run_both(server, case, **options):
    """Outputs of the quantizing graph; checks that the saved file samples the very same latents."""
    outputs = server.run(quantize_graph(case, **options))
    quantized = server.latents(outputs, "quantized_latent")
    name = saved_name(outputs)
    steps = options.get("sample_steps", 8)
    loaded = server.latents(server.run(load_graph(case, name, sample_steps=steps)), "out")
    assert torch.equal(loaded, quantized)
    return (
        outputs,
        relative_error(server.latents(outputs, "full_latent"), quantized),
        server.base / "output" / "diffusion_models" / name,
    )


@pytest.mark.parametrize(
    ("method", "distance"), [("svdquant_r", 0.15), ("svdquant", 0.2), ("splitquant", 0.2), ("convrot", 0.2)]
)
def test_small_flux(server, method, distance):
    outputs, error, path = run_both(
        server, FLUX_TINY, method=method, samples=8, steps=6, prefix=f"diffusion_models/{method}"
    )
    assert error < distance
    report = outputs["report"]["text"][0]
    assert "16 layers" in report
    assert re.search(r"9\d\.\d % of the weights are quantized, \d+\.\d of \d+\.\d MB remain", report)
    assert "Left in 16 bit: txt_in (embedder, kept by the map), " in report
    assert "eager; triton: needs a GPU" in report
    pack = PackFile(path)
    assert pack.provenance["method"] == method
    assert pack.provenance["calibration"]["samples"] == 8
    # 16-bit tensors are stored in 16 bit, though ComfyUI on a CPU holds them in fp32.
    assert pack.tensor("img_in.weight").dtype == torch.bfloat16


def test_hard_outliers_tell_the_methods_apart(server, tiny_state):
    """The same graph with the baseline fails, so the distances above mean something."""
    save_file(add_outliers(tiny_state, 1.0), server.base / "models" / "diffusion_models" / "hard.safetensors")
    error = {}
    for method in ("svdquant_r", "rtn"):
        outputs = server.run(
            quantize_graph(
                FLUX_TINY | {"model": "hard.safetensors"},
                method=method,
                samples=8,
                steps=6,
                prefix="diffusion_models/hard",
            )
        )
        error[method] = relative_error(
            server.latents(outputs, "full_latent"), server.latents(outputs, "quantized_latent")
        )
    assert error["svdquant_r"] < 0.15
    assert error["rtn"] > 0.6


def test_on_hopper_it_runs_as_w8a8_and_is_saved_as_it_was(server):
    """Group-64 layers are requantized once at load: no further from full precision, and no byte of it reaches
    a file."""
    outputs, error, path = run_both(
        server, FLUX_TINY, method="svdquant", samples=8, steps=6, prefix="diffusion_models/hopper"
    )
    graph = load_graph(FLUX_TINY, path.name, model=node("TestLoadOnHopper", model_name=path.name))
    graph["save"] = node("NibbleSaveModel", model=["model", 0], filename_prefix="diffusion_models/back")
    again = server.run(graph)
    latents = server.latents(again, "out")
    assert not torch.equal(latents, server.latents(outputs, "quantized_latent"))
    assert relative_error(server.latents(outputs, "full_latent"), latents) < 1.1 * error
    before, after = PackFile(path), PackFile(path.with_name(saved_name(again)))
    assert before.specs == after.specs
    for name in before.specs:
        for key, tensor in before.layer(name).tensors.items():
            assert torch.equal(tensor, after.layer(name).tensors[key])


def test_one_block_pixart(server):
    outputs, error, path = run_both(server, PIXART, samples=3, steps=2)
    assert error < 0.1
    assert "8 layers" in outputs["report"]["text"][0]
    assert PackFile(path).family == "pixart"


def test_full_width_flux(server, full_width_flux):
    _, error, path = run_both(server, FLUX_WIDE, samples=2, steps=2, sample_steps=2)
    assert error < 0.1
    pack = PackFile(path)
    rows = [row for row in pack.report if row["block"]]
    bits = (
        8 * sum(row["nbytes"] for row in rows) / sum(row["in_features"] * row["out_features"] for row in rows)
    )
    assert bits < 4.6
    assert all(8 * row["nbytes"] < 4.6 * row["in_features"] * row["out_features"] for row in rows)


def test_data_free(server):
    graph = quantize_graph(FLUX_TINY, method="convrot", prefix="diffusion_models/datafree")
    del graph["quantize"]["inputs"]["calibration"], graph["calibrate"], graph["prompts"]
    outputs = server.run(graph)
    assert "no calibration was connected" in outputs["report"]["text"][0]


def test_calibration_is_reused_and_interrupted_ones_go_on(server):
    graph = quantize_graph(
        FLUX_TINY, method="rtn", samples=40, steps=20, seed=77, prefix="diffusion_models/x"
    )
    graph = {k: graph[k] for k in ("load", "prompts", "latent", "calibrate", "quantize", "report")}
    folder = server.base / "output" / "nibble_calibration"
    before = set(folder.iterdir()) if folder.exists() else set()

    def samples_done():
        new = (
            [p for f in set(folder.iterdir()) - before for p in f.glob("pass-*.safetensors")]
            if folder.exists()
            else []
        )
        return read_meta(new[0])["done"] if new else 0

    prompt = server.submit(graph)
    deadline = time.monotonic() + 300
    while samples_done() < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    server.post("/interrupt")
    with pytest.raises(RuntimeError, match="interrupted at NibbleCalibrate"):
        server.wait(prompt)
    done = samples_done()
    assert 5 <= done < 40
    log = server.base / "server.log"
    start = log.stat().st_size
    server.run(graph)
    # One line "0/20" opens each sampling run; a calibration that starts again would write 40 of them.
    assert 0 < log.read_bytes()[start:].decode().count("| 0/20 ") <= 40 - done
    assert samples_done() == 40


def test_two_prompt_inputs_and_a_list_count_each_entry(server):
    graph = quantize_graph(FLUX_TINY, method="rtn", samples=3, steps=1, prefix="diffusion_models/y")
    graph["calibrate"]["inputs"]["conditioning.positive1"] = ["prompt", 0]
    server.run(
        {k: graph[k] for k in ("load", "prompts", "prompt", "latent", "calibrate", "quantize", "report")}
    )


def test_sampling_patches_before_quantize_stay(server):
    """ModelSamplingFlux before Nibble Quantize changes the sigmas of the quantized model too."""
    graph = quantize_graph(FLUX_TINY, method="convrot", samples=2, steps=1, prefix="diffusion_models/z")
    graph["shifted"] = node(
        "ModelSamplingFlux", model=["load", 0], max_shift=4.0, base_shift=4.0, width=512, height=512
    )
    graph["quantize"]["inputs"]["model"] = ["shifted", 0]
    graph["calibrate"]["inputs"]["model"] = ["shifted", 0]
    graph["full"]["inputs"]["model"] = ["shifted", 0]
    outputs = server.run(graph)
    plain = server.run(
        quantize_graph(FLUX_TINY, method="convrot", samples=2, steps=1, prefix="diffusion_models/z")
    )
    quantized, full = server.latents(outputs, "quantized_latent"), server.latents(outputs, "full_latent")
    assert relative_error(full, quantized) < 0.25
    assert relative_error(server.latents(plain, "quantized_latent"), quantized) > 1.5 * relative_error(
        full, quantized
    )


def test_model_made_afresh_is_the_same(server):
    """As ComfyUI does for multi-GPU: from the live model in the graph, from the file when it was loaded."""
    graph = quantize_graph(FLUX_TINY, method="convrot", samples=2, steps=1, prefix="diffusion_models/afresh")
    graph["again"] = node("TestRebuild", model=["quantize", 0])
    graph["sample_again"] = sampling(["again", 0], ["prompt", 0], ["latent", 0])
    graph["again_latent"] = node("SaveLatent", samples=["sample_again", 0], filename_prefix="again")
    outputs = server.run(graph)
    want = server.latents(outputs, "quantized_latent")
    assert torch.equal(server.latents(outputs, "again_latent"), want)
    loaded = load_graph(FLUX_TINY, saved_name(outputs), model=node("TestRebuild", model=["load", 0]))
    assert torch.equal(server.latents(server.run(loaded), "out"), want)
