"""The example workflows run small in a real ComfyUI."""

import json
import re
from dataclasses import asdict
from itertools import combinations

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.assets.synthetic import (
    flux_shapes,
    pixart_shapes,
    save_random,
    sdxl_shapes,
    taesd_shapes,
    wan_shapes,
)
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.host.workflow_graphs import (
    STAGES,
    TRAINING,
    H,
    clip_of,
    of_kind,
    packs_of,
    pictures_are,
    save_nunchaku,
    saved_name,
    shrunk,
    size_of,
    twin,
    wan_vae_shapes,
    with_latents,
)
from comfyui_nibble.tests.support import relative_error


@pytest.fixture(scope="module")
def models(server, comfy):
    """Small random files under the very names that the workflows use."""
    folder = server.base / "models"
    for name in ("text_encoders", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)
    small = {
        "flux_4bit": (flux_shapes(hidden=H), taesd_shapes(16)),
        "flux_nunchaku": (flux_shapes(hidden=H), taesd_shapes(16)),
        "pixart_4bit": (pixart_shapes(), taesd_shapes(4)),
        "wan_4bit": (wan_shapes(), wan_vae_shapes()),
        "sdxl_4bit": (sdxl_shapes(), taesd_shapes(4)),
    }
    for name, (shapes, vae) in small.items():
        for n in twin(name).values():
            match n["class_type"]:
                case "UNETLoader":
                    save_random(folder / "diffusion_models" / n["inputs"]["unet_name"], shapes)
                case "NibbleLoadDiffusionModel":
                    save_nunchaku(folder / "diffusion_models" / n["inputs"]["model_name"], shapes)
                case "CheckpointLoaderSimple":
                    whole = {f"model.diffusion_model.{k}": s for k, s in shapes.items()} | {
                        f"first_stage_model.{k}": s for k, s in vae.items()
                    }
                    save_random(folder / "checkpoints" / n["inputs"]["ckpt_name"], whole)
                case "VAELoader":
                    save_random(folder / "vae" / n["inputs"]["vae_name"], vae)
                case "CLIPLoader" | "DualCLIPLoader":
                    # Only listed, never opened: see `shrunk`.
                    for key in n["inputs"].keys() & {"clip_name", "clip_name1", "clip_name2"}:
                        (folder / "text_encoders" / n["inputs"][key]).touch()
    g = torch.Generator().manual_seed(0)
    for n in of_kind(twin("flux_4bit_two_loras"), "LoraLoaderModelOnly").values():
        lora = {}
        for layer, rows, columns in (
            ("double_blocks.0.img_attn.qkv", 3 * H, H),
            ("single_blocks.0.linear2", H, 5 * H),
        ):
            lora[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, columns, generator=g) * 0.12
            lora[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=g) * 0.12
        save_file(lora, folder / "loras" / n["inputs"]["lora_name"])
    return folder


@pytest.fixture(scope="module")
def flux_4bit(server, models):
    """What running the first workflow gave. Others start from the file that it saves, and one from its
    calibration."""
    graph = shrunk(twin("flux_4bit"), 128)
    return graph, server.run(graph)


# PixArt's position embedding needs 272 pixels or more.
@pytest.mark.parametrize(
    ("name", "pixels", "layers"),
    [("flux_4bit", 128, 13), ("pixart_4bit", 288, 8), ("wan_4bit", 64, 11), ("sdxl_4bit", 128, 74)],
)
def test_twin_runs(server, models, request, name, pixels, layers):
    if name == "flux_4bit":
        graph, outputs = request.getfixturevalue(name)
    else:
        # Its 74 layers by GPTQ and with a low rank would take a minute; test_families_main_job has both.
        plain = {"NibbleQuantize": {"rank": 0, "gptq": False}} if name == "sdxl_4bit" else {}
        graph = shrunk(twin(name), pixels, **plain)
        outputs = server.run(graph)
    of = lambda kind: outputs[next(iter(of_kind(graph, kind)))]

    report = of("PreviewAny")["text"][0]
    assert f"{layers} layers" in report
    assert "Layer error on held-out tokens" in report

    pack = packs_of(server, graph, outputs)["svdquant_r"]
    assert len(pack.specs) == layers
    assert pack.provenance["method"] == "svdquant_r"
    assert pack.provenance["calibration"]["samples"] == 4
    pictures_are(server, outputs, graph, pixels)
    assert all(clip_of(server, outputs, key) == (5, pixels, pixels) for key in of_kind(graph, "SaveVideo"))


@pytest.fixture(scope="module")
def one_node(server, models):
    """What running the template with one node gave. Others find the file that it saves."""
    graph = shrunk(twin("flux_one_node"), 128)
    return graph, server.run(graph)


def made_by_one_node(server):
    return set((server.base / "output" / "diffusion_models").glob("flux1-dev-fast-*.safetensors"))


def test_one_node_runs(server, one_node):
    graph, outputs = one_node
    pictures_are(server, outputs, graph, 128)
    [shown] = of_kind(graph, "NibbleQuantizeForMyCard")
    assert len(outputs[shown]["images"]) == 2  # before and after
    [path] = made_by_one_node(server)
    assert path.name in outputs[shown]["text"][0]
    assert len(PackFile(path).specs) == 13


def test_two_loras_run(server, one_node):
    graph = with_latents(shrunk(twin("flux_4bit_two_loras"), 128))
    first, second = of_kind(graph, "LoraLoaderModelOnly")
    [path] = made_by_one_node(server)
    before = path.read_bytes()

    def sampled(*off):
        without = {
            key: graph[key] | {"inputs": graph[key]["inputs"] | {"strength_model": 0.0}} for key in off
        }
        outputs = server.run(graph | without)
        pictures_are(server, outputs, graph, 128)
        return server.latents(outputs, "latents_LoraLoaderModelOnly")

    found = [sampled(), sampled(first), sampled(second), sampled(first, second)]
    for a, b in combinations(found, 2):
        assert relative_error(a, b) > 0.02  # 0.040 to 0.059
    assert made_by_one_node(server) == {path}  # found, and not made again
    assert path.read_bytes() == before


def test_compare_runs(server, one_node):
    graph = shrunk(twin("flux_compare"), 128)
    outputs = server.run(graph)
    pictures_are(server, outputs, graph, 128)
    [slider] = of_kind(graph, "ImageCompare")
    both = outputs[slider]
    assert [len(both[name]) for name in ("a_images", "b_images")] == [1, 1]


def test_report_runs(server, one_node):
    graph = shrunk(twin("flux_report"), 128)
    outputs = server.run(graph)
    [shown] = of_kind(graph, "NibbleReport")
    assert min(size_of(server, outputs, shown)) > 300
    [table] = (outputs[key]["text"][0] for key in of_kind(graph, "PreviewAny"))
    assert table.startswith("### FLUX.1, SVDQuant")
    assert "Not measured" in table  # by the wish "fast" of the small run


def test_find_blocks_runs(server, flux_4bit):
    graph = with_latents(shrunk(twin("flux_find_blocks"), 128))
    folder = server.base / "output" / "nibble_calibration"
    # Nibble Guard keeps what it measured beside the calibration.
    calibrations = lambda: {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if not p.name.endswith(".guard.json")
    }
    before = calibrations()
    outputs = server.run(graph)
    assert calibrations() == before  # the first workflow's was read, and no other was made
    pictures_are(server, outputs, graph, 128)

    of = lambda kind: server.latents(outputs, f"latents_{kind}")
    full, packed, guarded = of("UNETLoader"), of("svdquant_r"), of("NibbleGuard")
    # 0.0049 and, guarded, 0.0045 of 0.0081.
    assert 0 < relative_error(full, of("NibbleSwapBlocks")) < relative_error(full, packed)
    assert relative_error(full, guarded) < relative_error(full, packed)
    assert relative_error(packed, of("NibbleSwapBlocks")) > 0.002  # 0.0074

    [report] = (outputs[key]["text"][0] for key in of_kind(graph, "PreviewAny"))
    assert re.search(r"[1-9]\d* of \d+ measured layers raised", report)

    name = saved_name(graph, outputs)
    pack = PackFile(server.base / "output" / "diffusion_models" / name)
    assert pack.provenance["guard"][0]["limit"] == 24.0
    # The saved file in place of Guard samples the same.
    guard = next(iter(of_kind(graph, "NibbleGuard")))
    ends = ("SaveLatent", "PreviewAny", "PreviewImage", "NibbleSaveModel", "NibbleCompare")
    again = {
        key: n for key, n in graph.items() if key == "latents_NibbleGuard" or n["class_type"] not in ends
    }
    again[guard] = node("NibbleLoadDiffusionModel", model_name=name)
    assert torch.equal(server.latents(server.run(again), "latents_NibbleGuard"), guarded)


def run_on_calibration_of(server, first, name):
    """(graph, outputs) of a workflow that reads the calibration of `first` and makes no other."""
    made = lambda: {
        p
        for p in (server.base / "output" / "nibble_calibration").iterdir()
        if p.is_dir() and p.suffix != ".training"
    }
    before, graph = made(), with_latents(shrunk(twin(name), 128))
    outputs = server.run(graph)
    assert made() == before
    pictures_are(server, outputs, graph, 128)
    return graph, outputs


@pytest.fixture(scope="module")
def three_methods(server, flux_4bit):
    return run_on_calibration_of(server, flux_4bit, "flux_three_methods")


def test_three_methods_run(server, three_methods):
    graph, outputs = three_methods
    packs = packs_of(server, graph, outputs)
    assert list(packs) == ["svdquant_r", "splitquant", "robuq"]
    for method, pack in packs.items():
        assert pack.provenance["method"] == method
        assert "training" not in pack.provenance
        assert len(pack.specs) == 13
        assert pack.path.name == f"flux1-dev-{method}_00001_.safetensors"
    of = lambda maker: server.latents(outputs, f"latents_{maker}")
    errors = {method: relative_error(of("UNETLoader"), of(method)) for method in packs}
    assert (
        0 < errors["svdquant_r"] < errors["splitquant"] < errors["robuq"]
    )  # the first 0.0081, the last 0.0193
    bits = {
        method: {part.weight.bits for s in pack.specs.values() if not s.weight_only for part in s.parts}
        for method, pack in packs.items()
    }
    assert bits == {"svdquant_r": {4}, "splitquant": {4}, "robuq": {2}}


def test_splitquant_trained_runs(server, flux_4bit, three_methods):
    graph, outputs = run_on_calibration_of(server, flux_4bit, "flux_splitquant_trained")
    pack = packs_of(server, graph, outputs)["splitquant_4"]
    assert pack.provenance["method"] == "splitquant_4"
    assert pack.provenance["training"] == json.loads(json.dumps(asdict(TRAINING)))
    [losses] = (server.base / "output" / "nibble_calibration").glob("*.training/losses.json")
    runs = json.loads(losses.read_text(encoding="utf-8")).values()
    assert {len(run["losses"]) for run in runs} == {config.steps for config in STAGES}
    [report] = (outputs[key]["text"][0] for key in of_kind(graph, "PreviewAny"))
    assert len(re.findall(r" trained \+\d", report)) == 10 * len(STAGES)  # all but the modulation
    full = server.latents(outputs, "latents_UNETLoader")
    assert torch.equal(server.latents(three_methods[1], "latents_UNETLoader"), full)
    assert 0 < relative_error(full, server.latents(outputs, "latents_splitquant_4")) < 0.0121  # untrained


def test_robuq_budget_runs(server, flux_4bit):
    graph, outputs = run_on_calibration_of(server, flux_4bit, "flux_robuq_budget")
    pack = packs_of(server, graph, outputs)["NibbleAllocateBits"]
    allocation = pack.provenance["allocation"]
    assert allocation["budget"] == "3 activation bits on average"
    assert allocation["gains"] is True
    of = {
        name: (spec.parts[0], spec.out_features * spec.in_features)
        for name, spec in pack.specs.items()
        if not spec.weight_only
    }
    assert len(of) == 10
    assert {part.weight.bits for part, _ in of.values()} == {2}
    mean = sum(part.activation.bits * n for part, n in of.values()) / sum(n for _, n in of.values())
    assert 2.97 <= mean <= 3.0

    [report] = (outputs[key]["text"][0] for key in of_kind(graph, "PreviewAny"))
    assert "Layer noise is weighted by gains" in report
    reached = re.search(r"reached:\s+([\d.]+)\s+activation\s+bits", report)
    assert float(reached[1]) == pytest.approx(mean, abs=0.006)
    [plot] = of_kind(graph, "PreviewImage")
    assert min(size_of(server, outputs, plot)) > 400
    full, reduced = (
        server.latents(outputs, f"latents_{maker}") for maker in ("UNETLoader", "NibbleAllocateBits")
    )
    assert relative_error(full, reduced) > 0
