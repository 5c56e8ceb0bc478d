"""Nibble Guard on the small FLUX, over HTTP."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.graphs import FLUX_TINY, load_graph, node, quantize_graph, sampling
from comfyui_nibble.tests.host.server import GraphError
from comfyui_nibble.tests.host.test_main_job import saved_name
from comfyui_nibble.tests.support import relative_error

CALIBRATION = {"method": "svdquant_r", "samples": 8, "steps": 6}
H = 256


@pytest.fixture(scope="module")
def start(server):
    """The quantized file, the latents of both models, and those of the quantized one with all that Guard can
    raise at 16 bit, which are what its work is measured against: it leaves the modulation alone. One step:
    over more, flipped codes part the trajectories.
    """
    outputs = server.run(
        quantize_graph(FLUX_TINY, prefix="diffusion_models/unguarded", sample_steps=1, **CALIBRATION)
    )
    full, quantized = server.latents(outputs, "full_latent"), server.latents(outputs, "quantized_latent")
    name = saved_name(outputs)
    found = SimpleNamespace(full=full, quantized=quantized, name=name, pack=packed(server, name))
    outputs = server.run(
        guard_graph(found, "diffusion_models/exact", quality_db=60.0, allow_w4a8=False, allow_w8a8=False)
    )
    found.exact, found.exact_pack, found.exact_text = (
        server.latents(outputs, "out"),
        packed(server, saved_name(outputs)),
        outputs["report"]["text"][0],
    )
    found.error = relative_error(found.exact, quantized)
    return found


def packed(server, name):
    return PackFile(server.base / "output" / "diffusion_models" / name)


def guard_graph(start, prefix="diffusion_models/guarded", **options):
    """Calibrate (done before, so read from the disk) and load -> guard -> save and sample."""
    settings = {
        "budget": "quality (dB)", "quality_db": 24.0, "memory_mib": 0.0, "unit": "layer",
        "allow_w4a8": True, "allow_w8a8": True, "allow_16_bit": True,
    }  # fmt: skip
    graph = quantize_graph(FLUX_TINY, **CALIBRATION)
    for name in ("quantize", "full", "full_latent", "quantized", "quantized_latent"):
        del graph[name]
    return graph | {
        "packed": node("NibbleLoadDiffusionModel", model_name=start.name),
        "guard": node(
            "NibbleGuard",
            model=["load", 0],
            quantized=["packed", 0],
            calibration=["calibrate", 0],
            **(settings | options),
        ),
        "report": node("PreviewAny", source=["guard", 1]),
        "save": node("NibbleSaveModel", model=["guard", 0], filename_prefix=prefix),
        "sample": sampling(["guard", 0], ["prompt", 0], ["latent", 0], steps=1),
        "out": node("SaveLatent", samples=["sample", 0], filename_prefix="guarded"),
    }


def guard(server, start, **options):
    """(report, file, relative error of the latents as in `start`); the saved file must sample the same
    latents."""
    outputs = server.run(guard_graph(start, **options))
    latents, name = server.latents(outputs, "out"), saved_name(outputs)
    assert torch.equal(
        server.latents(server.run(load_graph(FLUX_TINY, name, sample_steps=1)), "out"), latents
    )
    text = " ".join(outputs["report"]["text"][0].split())  # without its line breaks
    return text, packed(server, name), relative_error(start.exact, latents)


def layer_bytes(pack, names):
    """What these layers take in a file, packed or not."""
    keys = [k for k in pack._keys if k.rpartition(".")[0] in names]
    return sum(pack.tensor(k).nbytes for k in keys)


def rows(pack):
    return {r["name"]: r for r in pack.report}


def test_quality_budget_is_reached(server, start):
    target = 30.0
    below = {n for n, r in rows(start.pack).items() if r["sqnr_db"] is not None and r["sqnr_db"] < target}
    assert 2 <= len(below) < 12
    text, pack, error = guard(server, start, quality_db=target)
    after = rows(pack)
    assert all(r["sqnr_db"] >= target for r in after.values() if r["sqnr_db"] is not None)
    changed = {n for n in start.pack.specs if pack.specs.get(n) != start.pack.specs[n]}
    assert changed == below == set(pack.provenance["guard"][0]["raised"])
    assert error < 0.4 * start.error  # 0.020 of 0.07
    assert f"{len(below)} of 12 measured layers raised" in text
    assert len(re.findall(r"below the target 30 dB", text)) == len(below)
    # Measured on the same tokens as by Nibble Quantize, so what stays has the row that it had.
    for name in set(start.pack.specs) - changed:
        assert after[name] == rows(start.pack)[name]
        assert all(
            torch.equal(t, pack.layer(name).tensors[k]) for k, t in start.pack.layer(name).tensors.items()
        )


def test_sixteen_bit_is_the_original(start, tiny_state):
    text, pack = start.exact_text, start.exact_pack
    assert "12 of 12 measured layers raised: 12 to 16 bit" in text
    assert "Not measured and left as they are: 4 weight-only layers" in text
    weight_only = {n for n, s in start.pack.specs.items() if s.weight_only}
    assert set(pack.specs) == weight_only
    for name in set(start.pack.specs) - weight_only:
        for leaf in ("weight", "bias"):
            assert torch.equal(pack.tensor(f"{name}.{leaf}"), tiny_state[f"{name}.{leaf}"])
        assert (rows(pack)[name]["what"], rows(pack)[name]["nbytes"]) == ("16 bit", 0)
    assert relative_error(start.full, start.exact) < relative_error(start.full, start.quantized)


@pytest.mark.parametrize(("unit", "mib"), [("layer", 0.4), ("block", 1.0)])
def test_memory_budget_is_kept(server, start, unit, mib):
    text, pack, error = guard(
        server, start, budget="memory (MiB)", memory_mib=mib, unit=unit, allow_w8a8=False
    )
    names = set(start.pack.specs)
    extra = layer_bytes(pack, names) - layer_bytes(start.pack, names)
    assert 0 < extra <= mib * 2**20
    said = re.search(r"\+([\d.]+) KiB of (409.6 KiB|1.0 MiB) allowed", text)
    assert float(said[1]) == pytest.approx(extra / 1024, abs=0.06)
    assert error < 0.6 * start.error  # 0.034 and 0.022 of 0.07
    assert "Not raised further" in text
    if unit == "block":
        raised = pack.provenance["guard"][0]["raised"]
        blocks = {
            rows(pack)[n]["block"]: {
                raised.get(m) for m, r in rows(pack).items() if r["block"] == rows(pack)[n]["block"]
            }
            for n in raised
        }
        assert all(len(precisions - {None}) == 1 for precisions in blocks.values())


def test_no_memory_still_gets_w4a8(server, start):
    text, pack, error = guard(
        server, start, budget="memory (MiB)", memory_mib=0.0, allow_w8a8=False, allow_16_bit=False
    )
    names = set(start.pack.specs)
    assert layer_bytes(pack, names) == layer_bytes(start.pack, names)
    raised = pack.provenance["guard"][0]["raised"]
    assert set(raised.values()) == {"W4A8"}
    assert f"W4A8 costs no memory, only that: {len(raised)} of them." in text
    for name in raised:
        assert all(
            torch.equal(t, pack.layer(name).tensors[k]) for k, t in start.pack.layer(name).tensors.items()
        )
        assert rows(pack)[name]["sqnr_db"] > rows(start.pack)[name]["sqnr_db"]
    assert error < 0.6 * start.error  # 0.035 of 0.07


def test_guarded_in_the_graph_and_again(server, start):
    """Straight from Nibble Quantize, and a second Guard on the result: only what is below the new target
    changes once more."""
    graph = guard_graph(start, quality_db=30.0)
    graph["quantize"] = quantize_graph(FLUX_TINY, **CALIBRATION)["quantize"]
    graph["guard"]["inputs"]["quantized"] = ["quantize", 0]
    graph["again"] = node(
        "NibbleGuard", **(graph["guard"]["inputs"] | {"quantized": ["guard", 0], "quality_db": 34.0})
    )
    graph["save"]["inputs"]["model"] = ["again", 0]
    pack = packed(server, saved_name(server.run(graph)))
    first, second = pack.provenance["guard"]
    assert (first["limit"], second["limit"]) == (30.0, 34.0)
    assert second["raised"]
    assert all(r["sqnr_db"] >= 34 for r in rows(pack).values() if r["sqnr_db"] is not None)
    assert pack.provenance["model"] == start.pack.provenance["model"]


def test_loras_and_sampling_patches_carry_over(server, start):
    """Put on before Guard, they do what they do behind it."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "double_blocks.0.img_attn.qkv": (3 * H, H),
        "double_blocks.0.txt_mlp.2": (H, 4 * H),
        "single_blocks.1.linear2": (H, 5 * H),
    }
    tensors = {}
    for name, (n, k) in shapes.items():
        key = f"diffusion_model.{name}"
        tensors |= {
            f"{key}.lora_A.weight": torch.randn(8, k, generator=g) * 0.12,
            f"{key}.lora_B.weight": torch.randn(n, 8, generator=g) * 0.12,
        }
    save_file(tensors, server.base / "models" / "loras" / "guard.safetensors")
    results = []
    for before in (True, False):
        graph = guard_graph(
            start, quality_db=30.0, allow_w4a8=False, allow_w8a8=False
        )  # linear2 of these becomes 16 bit
        del graph["save"]
        source = "packed" if before else "guard"
        graph["lora"] = node(
            "LoraLoaderModelOnly", model=[source, 0], lora_name="guard.safetensors", strength_model=1.0
        )
        graph["shifted"] = node(
            "ModelSamplingFlux", model=["lora", 0], max_shift=4.0, base_shift=4.0, width=512, height=512
        )
        (graph["guard"] if before else graph["sample"])["inputs"]["quantized" if before else "model"] = [
            "shifted",
            0,
        ]
        graph["unpatched"] = sampling([source, 0], ["prompt", 0], ["latent", 0])
        graph["unpatched_latent"] = node("SaveLatent", samples=["unpatched", 0], filename_prefix="unpatched")
        outputs = server.run(graph)
        results.append(server.latents(outputs, "out"))
        assert relative_error(server.latents(outputs, "unpatched_latent"), results[-1]) > 0.2
    assert torch.equal(*results)


def refused(server, start, match, change=lambda graph: None, **options):
    graph = guard_graph(start, **options)
    del graph["save"], graph["sample"], graph["out"]
    change(graph)
    with pytest.raises(GraphError, match=match):
        server.run(graph)


def other_model(server, tiny_state):
    save_file(
        {k: (v.float() * 1.01).bfloat16() for k, v in tiny_state.items()},
        server.base / "models/diffusion_models/other_guard.safetensors",
    )
    return node("UNETLoader", unet_name="other_guard.safetensors", weight_dtype="default")


def test_calibration_of_another_model(server, start, tiny_state):
    def change(graph):
        graph["other"] = other_model(server, tiny_state)
        graph["calibrate"]["inputs"] |= {"model": ["other", 0], "samples": 2, "steps": 1}

    refused(
        server,
        start,
        f"NibbleGuard: .*was made with model .*, this one is {start.pack.provenance['model']}",
        change,
    )


def test_another_full_precision_model(server, start, tiny_state):
    def change(graph):
        graph["other"] = other_model(server, tiny_state)
        graph["guard"]["inputs"]["model"] = ["other", 0]

    message = (
        f"Nibble Guard: the quantized model was made from model {start.pack.provenance['model']}, the "
        "full-precision model is"
    )
    refused(server, start, message, change)


def test_models_at_the_wrong_input(server, start):
    def full_twice(graph):
        graph["guard"]["inputs"]["quantized"] = ["load", 0]

    def quantized_twice(graph):
        graph["guard"]["inputs"]["model"] = ["packed", 0]

    refused(server, start, "the model at 'quantized' was not quantized by Nibble", full_twice)
    refused(
        server, start, "this model is quantized already .* connect the full-precision model", quantized_twice
    )


def test_no_precision_and_no_memory_below_zero(server, start):
    refused(server, start, "no precision is allowed", allow_w4a8=False, allow_w8a8=False, allow_16_bit=False)
    refused(server, start, "memory_mib", budget="memory (MiB)", memory_mib=-1.0)  # by ComfyUI itself


def test_a_swap_with_another_model(server, start, tiny_state):
    """Both models that Nibble Swap Blocks joins must be the one that is measured against."""

    def change(graph):
        graph["other"] = other_model(server, tiny_state)
        graph["swapped"] = node(
            "NibbleSwapBlocks", model_a=["packed", 0], model_b=["other", 0], blocks="single 1"
        )
        graph["guard"]["inputs"]["quantized"] = ["swapped", 0]

    ours = start.pack.provenance["model"]
    refused(
        server,
        start,
        f"the quantized model was made from model (?!{ours})[0-9a-f]+, the full-precision model is {ours}",
        change,
    )


def test_bypass_lora_in_front(server, start):
    tensors = {
        f"diffusion_model.double_blocks.0.img_attn.proj.lora_{x}.weight": torch.zeros(s)
        for x, s in (("A", (4, H)), ("B", (H, 4)))
    }
    save_file(tensors, server.base / "models" / "loras" / "bypass_guard.safetensors")

    def change(graph):
        graph["bypass"] = node(
            "LoraLoaderBypassModelOnly",
            model=["packed", 0],
            lora_name="bypass_guard.safetensors",
            strength_model=1.0,
        )
        graph["guard"]["inputs"]["quantized"] = ["bypass", 0]

    refused(
        server, start, r"the quantized model has injections \(bypass_lora\).* behind Nibble Guard", change
    )
