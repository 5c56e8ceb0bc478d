"""Nibble Swap Blocks: the result against files that hold the same layers, and what is shared, carried over
and refused."""

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.convert.inspect import describe
from comfyui_nibble.quant_core.formats import nibble
from comfyui_nibble.tests.assets.synthetic import flux_shapes, save_random
from comfyui_nibble.tests.host.graphs import FLUX_TINY, node, quantize_graph, sampling
from comfyui_nibble.tests.host.server import GraphError
from comfyui_nibble.tests.support import relative_error

H = 256
FULL = node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default")
DOUBLE = [
    f"double_blocks.0.{s}_{leaf}"
    for s in ("img", "txt")
    for leaf in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
]
SINGLE = [f"single_blocks.{i}.{leaf}" for i in range(2) for leaf in ("linear1", "linear2", "modulation.lin")]


def packed(name):
    return node("NibbleLoadDiffusionModel", model_name=f"{name}.safetensors")


SVD, ROT = packed("swap_svd_00001_"), packed("swap_rot_00001_")


@pytest.fixture(scope="module", autouse=True)
def files(server):
    """{"svd", "rot"}: two quantizations of the small FLUX, as packed files."""
    for name, method in (("svd", "svdquant_r"), ("rot", "convrot")):
        graph = quantize_graph(FLUX_TINY, method=method, prefix=f"diffusion_models/swap_{name}")
        server.run({k: graph[k] for k in ("load", "prompts", "latent", "calibrate", "quantize", "save")})
    return {
        name: nibble.PackFile(folder(server) / f"swap_{name}_00001_.safetensors") for name in ("svd", "rot")
    }


@pytest.fixture(scope="module")
def loras(server):
    """ "double" and "single": LoRAs on packed layers, and that of "single" on the 16-bit `img_in` as well."""
    g = torch.Generator().manual_seed(0)
    layers = {
        "double": {"double_blocks.0.img_attn.qkv": (3 * H, H), "double_blocks.0.txt_mlp.2": (H, 4 * H)},
        "single": {"single_blocks.1.linear2": (H, 5 * H), "img_in": (H, 64)},
    }
    for name, shapes in layers.items():
        tensors = {}
        for layer, (n, k) in shapes.items():
            tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, k, generator=g) * 0.12
            tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(n, 4, generator=g) * 0.12
        save_file(tensors, server.base / "models" / "loras" / f"swap_{name}.safetensors")


def folder(server):
    return server.base / "output" / "diffusion_models"


def lora(name, model, kind="LoraLoaderModelOnly"):
    return node(kind, model=[model, 0], lora_name=f"swap_{name}.safetensors", strength_model=1.0)


def sampled(model, steps=2):
    """Nodes that sample with node `model`."""
    return {
        "latent": FLUX_TINY["latent"],
        "prompt": FLUX_TINY["prompt"],
        "sample": sampling([model, 0], ["prompt", 0], ["latent", 0], steps=steps),
        "out": node("SaveLatent", samples=["sample", 0], filename_prefix="swap"),
    }


def swapped(a, b, blocks, **extra):
    """Loads, swaps, samples with "swap" or, if it is among `extra`, "model"."""
    swap = node("NibbleSwapBlocks", model_a=["a", 0], model_b=["b", 0], blocks=blocks)
    graph = {"a": a, "b": b, "swap": swap, "report": node("PreviewAny", source=["swap", 1])} | extra
    return graph | sampled("model" if "model" in extra else "swap")


def latents(server, graph):
    return server.latents(server.run(graph), "out")


def plain(server, model, **extra):
    return latents(server, {"load": model} | extra | sampled("model" if "model" in extra else "load"))


def composed(server, name, of, tiny_state):
    """A packed file written by hand: of(layer) says which PackFile a layer comes from, None for full
    precision."""
    layers, rest = {}, {k: t for k, t in tiny_state.items() if k.rpartition(".")[0] not in DOUBLE + SINGLE}
    for layer in DOUBLE + SINGLE:
        if (file := of(layer)) is None:
            rest |= {f"{layer}.{leaf}": tiny_state[f"{layer}.{leaf}"] for leaf in ("weight", "bias")}
        else:
            layers[layer] = file.layer(layer)
    nibble.save(folder(server) / f"{name}.safetensors", layers, rest, "flux", {}, [])
    return packed(name)


def test_all_of_the_full_precision_model_is_that_model(server):
    assert torch.equal(latents(server, swapped(SVD, FULL, "all")), plain(server, FULL))


def test_a_model_with_itself_is_itself(server):
    for blocks in ("double 0", "*mlp.2", "all"):
        assert torch.equal(latents(server, swapped(SVD, SVD, blocks)), plain(server, SVD))


@pytest.mark.parametrize(
    ("a", "b", "blocks", "takes"),
    [
        ("svd", None, "double 0", lambda n: n.startswith("double")),
        (None, "svd", "double 0", lambda n: n.startswith("double")),
        ("svd", "rot", "single 1; *.mlp", lambda n: n.startswith("single_blocks.1") or "_mlp" in n),
        # A GELU that a packed layer has taken over stands beside a layer of the other model.
        ("svd", None, "*img_mlp.2", lambda n: n.endswith("img_mlp.2")),
        ("svd", None, "*mlp.0", lambda n: n.endswith("mlp.0")),
        (None, "svd", "*img_mlp.2", lambda n: n.endswith("img_mlp.2")),
        (None, "rot", "*mlp.0", lambda n: n.endswith("mlp.0")),
    ],
)
def test_result_is_what_a_file_with_these_layers_gives(server, files, tiny_state, a, b, blocks, takes):
    kind = {"svd": SVD, "rot": ROT, None: FULL}
    reference = composed(server, "reference", lambda n: files.get(b if takes(n) else a), tiny_state)
    got = latents(server, swapped(kind[a], kind[b], blocks))
    assert torch.equal(got, plain(server, reference))
    assert not torch.equal(got, plain(server, kind[a]))


@pytest.mark.parametrize("blocks", ["*img_mlp.2", "*txt_mlp.2", "*mlp.0"])
def test_one_quantized_layer_of_an_mlp_moves_the_full_model_little(server, blocks):
    """By 0.0048, 0.0017 and 0.0072 (measured); with a GELU too many in front of mlp.2 by 0.203 and 0.032,
    without one by 1.06 and 0.43."""
    assert 0 < relative_error(plain(server, FULL), latents(server, swapped(FULL, SVD, blocks))) < 0.01


def test_error_falls_with_each_part_that_comes_from_full_precision(server):
    full = plain(server, FULL)
    parts = ["single 1", "single 1; double 0", "single 0-1; double 0"]
    errors = [relative_error(full, plain(server, ROT))] + [
        relative_error(full, latents(server, swapped(ROT, FULL, p))) for p in parts
    ]
    # 0.205, 0.182, 0.070 and 0 measured: most of it is the double block's.
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[2] < 0.5 * errors[1] < 0.5 * errors[0]
    assert errors[3] == 0


def test_report(server, files, tiny_state):
    blocks = "double 0\n img_in"
    lines = server.run(swapped(SVD, FULL, blocks))["report"]["text"][0].splitlines()
    mib = lambda size: f"{size / 2**20:.1f} MiB"
    # ComfyUI holds 16-bit tensors in fp32 on a CPU.
    full = sum(4 * t.numel() for t in tiny_state.values())
    size = lambda names: sum(files["svd"].layer(n).nbytes for n in names)
    floats = lambda names: sum(
        4 * tiny_state[f"{n}.{leaf}"].numel() for n in names for leaf in ("weight", "bias")
    )
    result = full - floats(SINGLE) + size(SINGLE)
    assert lines[:3] == [
        f"FLUX.1: A with double 0; img_in of B, {mib(result)}",
        f"A: {files['svd'].path}, {mib(result - floats(DOUBLE) + size(DOUBLE))}",
        f"B: full precision, {mib(full)}",
    ]
    kinds = Counter(files["svd"].specs[n].describe() for n in SINGLE)
    assert lines[3] == (
        f"From A: 6 layers{''.join(f', {count} {kind}' for kind, count in kinds.most_common())}; 18 "
        "other tensors"
    )
    # img_in's weight and bias, and the scales of the block's four norms.
    assert lines[4:6] == ["From B: 10 layers, 10 full precision; 6 other tensors", ""]
    assert lines[6:] == [
        f"{n:29}  full precision instead of {files['svd'].specs[n].describe()}" for n in DOUBLE
    ]


def test_saved_and_loaded_it_is_the_same(server, files):
    save = node("NibbleSaveModel", model=["swap", 0], filename_prefix="diffusion_models/swapped")
    outputs = server.run(swapped(SVD, FULL, "single 0", save=save))
    path = folder(server) / "swapped_00001_.safetensors"
    assert torch.equal(server.latents(outputs, "out"), plain(server, packed("swapped_00001_")))
    saved = nibble.PackFile(path)
    kept = [n for n in DOUBLE + SINGLE if not n.startswith("single_blocks.0")]
    assert saved.specs == {n: files["svd"].specs[n] for n in kept}
    assert saved.provenance["a"] == files["svd"].provenance
    # The fingerprint of the full-precision model is the one that its quantization was made with.
    assert saved.provenance["b"] == {"model": files["svd"].provenance["model"], "method": "full precision"}
    assert saved.provenance["settings"] == {"blocks": "single 0"}
    assert [r for r in saved.report if r["name"] in kept] == [
        r for r in files["svd"].report if r["name"] in kept
    ]
    assert sorted(describe(path)["left in 16 bit"]) == sorted(set(DOUBLE + SINGLE) - set(kept))


def test_everything_from_full_precision_can_be_saved_too(server):
    save = node("NibbleSaveModel", model=["swap", 0], filename_prefix="diffusion_models/whole")
    server.run(swapped(SVD, FULL, "all", save=save))
    assert torch.equal(plain(server, packed("whole_00001_")), plain(server, FULL))


def test_made_afresh_it_is_the_same(server):
    graph = swapped(SVD, ROT, "double 0", model=node("TestRebuild", model=["swap", 0]))
    assert torch.equal(latents(server, graph), latents(server, swapped(SVD, ROT, "double 0")))


def test_both_inputs_stay_as_they_are(server):
    graph = swapped(SVD, ROT, "single 0-1")
    for name in ("a", "b"):
        graph[f"sample_{name}"] = sampling([name, 0], ["prompt", 0], ["latent", 0], steps=2)
        graph[f"out_{name}"] = node("SaveLatent", samples=[f"sample_{name}", 0], filename_prefix="swap")
    outputs = server.run(graph)
    assert torch.equal(server.latents(outputs, "out_a"), plain(server, SVD))
    assert torch.equal(server.latents(outputs, "out_b"), plain(server, ROT))


def test_memory_is_shared_with_both(server, files):
    shared = {f"shared_{x}": node("TestSharedTensors", model=["swap", 0], source=[x, 0]) for x in ("a", "b")}
    shown = {f"text_{x}": node("PreviewAny", source=[f"shared_{x}", 0]) for x in ("a", "b")}
    outputs = server.run(swapped(SVD, ROT, "double 0", **shared, **shown))
    with_a, with_b = (set(outputs[f"text_{x}"]["text"][0].splitlines()) for x in ("a", "b"))
    keys = lambda file, names: {f"{n}.{leaf}" for n in names for leaf in file.specs[n].shapes()}
    # 16-bit linear layers as well: ComfyUI runs them on a CPU in the fp32 in which it already holds them.
    linear = {
        f"{n}.{leaf}"
        for n in ("img_in", "txt_in", "time_in.in_layer", "final_layer.linear")
        for leaf in ("weight", "bias")
    }
    assert keys(files["svd"], SINGLE) | linear <= with_a
    assert keys(files["rot"], DOUBLE) <= with_b
    assert not any(k.startswith("double") for k in with_a)
    assert not any(not k.startswith("double") for k in with_b)
    outputs = server.run(swapped(SVD, FULL, "double 0", **shared, **shown))
    with_b = set(outputs["text_b"]["text"][0].splitlines())
    assert with_b == {f"{n}.{leaf}" for n in DOUBLE for leaf in ("weight", "bias")}


@pytest.mark.parametrize(("a", "b"), [(SVD, FULL), (SVD, ROT), (FULL, SVD)])
def test_loras_stay_on_what_is_taken(server, loras, a, b):
    """On either side both LoRAs are set; only that on the part taken from there remains."""
    both = lambda x: {f"{x}1": lora("double", x), f"{x}2": lora("single", f"{x}1")}
    for x, left in (("a", "single"), ("b", "double")):
        graph = swapped(a, b, "double 0", **both(x))
        graph["swap"]["inputs"][f"model_{x}"] = [f"{x}2", 0]
        got = latents(server, graph)
        assert torch.equal(got, latents(server, swapped(a, b, "double 0", model=lora(left, "swap"))))
        assert not torch.equal(got, latents(server, swapped(a, b, "double 0")))


def test_a_model_that_is_loaded_with_a_lora_gives_its_own_weights(server, loras):
    """The LoRA's weights stand in the place of the model's own when the swap reads it."""
    graph = swapped(
        FULL,
        SVD,
        "single 0",
        with_lora=lora("single", "a"),
        first=sampling(["with_lora", 0], ["prompt", 0], ["latent", 0], steps=1),
    )
    graph["wait"] = node("TestAfter", model=["a", 0], samples=["first", 0])
    graph["swap"]["inputs"]["model_a"] = ["wait", 0]
    assert torch.equal(latents(server, graph), latents(server, swapped(FULL, SVD, "single 0")))


def test_sampling_settings_come_from_a(server):
    shift = lambda x: node(
        "ModelSamplingFlux", model=[x, 0], max_shift=4.0, base_shift=4.0, width=512, height=512
    )
    graph = swapped(SVD, ROT, "double 0", shifted=shift("a"))
    graph["swap"]["inputs"]["model_a"] = ["shifted", 0]
    got = latents(server, graph)
    assert torch.equal(got, latents(server, swapped(SVD, ROT, "double 0", model=shift("swap"))))
    graph = swapped(SVD, ROT, "double 0", shifted=shift("b"))
    graph["swap"]["inputs"]["model_b"] = ["shifted", 0]
    assert torch.equal(latents(server, graph), latents(server, swapped(SVD, ROT, "double 0")))
    assert not torch.equal(got, latents(server, graph))


def test_fp8_models_of_comfyui(server, tiny_state):
    """Cast to fp8 by the loader, and stored in scaled fp8: their values are taken, exactly."""
    cast = FULL | {"inputs": FULL["inputs"] | {"weight_dtype": "fp8_e4m3fn"}}
    assert torch.equal(latents(server, swapped(SVD, cast, "all")), plain(server, cast))
    scaled = {}
    for key, tensor in tiny_state.items():
        scaled[key] = tensor
        name = key.removesuffix(".weight")
        if name in DOUBLE + SINGLE and name != key:
            scale = tensor.float().abs().max() / 448
            scaled |= {key: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{name}.scale_weight": scale}
    scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)  # two: multiply in full precision
    save_file(scaled, server.base / "models" / "diffusion_models" / "scaled.safetensors")
    stored = node("UNETLoader", unet_name="scaled.safetensors", weight_dtype="default")
    assert relative_error(plain(server, stored), latents(server, swapped(SVD, stored, "all"))) < 0.01
    assert not torch.equal(plain(server, stored), plain(server, FULL))


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("pixart.safetensors", None, 
            r"model_b is PixArt-alpha and PixArt-Sigma, blocks 1, hidden width 1152. .*img_in.weight: 256 "
            r"x 64 in model_a, missing in model_b"),
        ("swap_deep.safetensors", flux_shapes(2, 2, H, 64, 64, False),
        r"model_b is FLUX.1, double_blocks 2, single_blocks 2, hidden width 256"),
        ("swap_wide.safetensors", flux_shapes(1, 2, 2 * H, 64, 64, False), 
            r"model_b is FLUX.1, double_blocks 1, single_blocks 2, hidden width 512. .*img_in.weight: 256 "
            r"x 64 in model_a, 512 x 64 in model_b"),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(server, name, shapes, message):
    if shapes is not None:
        save_random(server.base / "models" / "diffusion_models" / name, shapes)
    other = node("UNETLoader", unet_name=name, weight_dtype="default")
    start = (
        r"NibbleSwapBlocks: Nibble Swap Blocks: the models differ in architecture. model_a is FLUX.1, "
        r"double_blocks 1, single_blocks 2, hidden width 256; "
    )
    with pytest.raises(GraphError, match=start + message):
        server.run(swapped(SVD, other, "all"))


def test_two_full_precision_models_are_refused(server):
    with pytest.raises(
        GraphError, match="neither model is quantized by Nibble. Connect at least one from Nibble Quantize"
    ):
        server.run(swapped(FULL, FULL, "all"))


@pytest.mark.parametrize("side", ["a", "b"])
def test_bypass_loras_are_refused(server, loras, side):
    graph = swapped(FULL, SVD, "all") | {"bypass": lora("single", "a", "LoraLoaderBypassModelOnly")}
    graph["swap"]["inputs"] = {
        "model_a": ["b", 0],
        "model_b": ["b", 0],
        "blocks": "all",
        f"model_{side}": ["bypass", 0],
    }
    with pytest.raises(
        GraphError, match=rf"model_{side} has injections \(bypass_lora\).* behind Nibble Swap Blocks"
    ):
        server.run(graph)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            "",
            r"Nibble Swap Blocks, blocks: no blocks are chosen, the text is empty. This model has double 0 "
            r"\(in each: img_attn",
        ),
        (
            "double 0-1",
            r"'double 0-1': there is no block 1 in double_blocks. This model has double 0 .*; single 0-1 ",
        ),
        ("*.atn", r"'\*.atn' matches no module"),
    ],
)
def test_bad_selections_are_refused(server, blocks, message):
    with pytest.raises(GraphError, match=message):
        server.run(swapped(SVD, FULL, blocks))
