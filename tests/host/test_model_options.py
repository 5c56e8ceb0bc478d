"""What users set on a model besides LoRA: batches, guidance, patches of blocks and attention, ControlNet,
shifted schedules, several models in one graph. The quantized model takes them as the full-precision one does."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state
from comfyui_nibble.tests.codes import EDGE, ROUNDING
from comfyui_nibble.tests.host.graphs import (
    FLUX_TINY,
    PIXART,
    keep_codes,
    node,
    quantize_graph,
    sampling,
    take_codes,
    took_codes,
)
from comfyui_nibble.tests.support import relative_error

FILES = {"svdquant": FLUX_TINY, "convrot": FLUX_TINY, "pixart": PIXART}
FULL = node("UNETLoader", unet_name=FLUX_TINY["model"], weight_dtype="default")
NEGATIVE = {
    "flux": node("TestCaptions", captions="small green square left on striped yellow background"),
    "pixart": node("TestConditioning", tokens=9, dim=4096, pooled_dim=0, seed=7, entries=1),
}


@pytest.fixture(scope="module")
def packed(server):
    """{kind: loader node of a packed file}: two quantizations of the small FLUX and one of PixArt, without
    data."""
    out = {}
    for kind, case in FILES.items():
        graph = quantize_graph(
            case,
            method="svdquant" if kind == "svdquant" else "convrot",
            prefix=f"diffusion_models/options_{kind}",
        )
        for name in (
            "calibrate",
            "prompts",
            "prompt",
            "latent",
            "full",
            "full_latent",
            "quantized",
            "quantized_latent",
        ):
            del graph[name]
        del graph["quantize"]["inputs"]["calibration"]
        server.run(graph)
        out[kind] = node("NibbleLoadDiffusionModel", model_name=f"options_{kind}_00001_.safetensors")
    return out


def branches(case, models, extra=None, steps=2, **samplers):
    """A graph with `models` and `extra` nodes, and a sampler for each of `samplers`: its name to (model,
    other inputs of the sampler)."""
    graph = {"latent": case["latent"], "prompt": case["prompt"], **models, **(extra or {})}
    for name, (model, inputs) in samplers.items():
        sampler = sampling([model, 0], ["prompt", 0], ["latent", 0], steps=steps)
        sampler["inputs"] |= inputs
        graph |= {
            f"{name}_sampler": sampler,
            name: node("SaveLatent", samples=[f"{name}_sampler", 0], filename_prefix=name),
        }
    return graph


def latents(server, graph, *names):
    outputs = server.run(graph)
    return [server.latents(outputs, name) for name in names]


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def keeping(server, graph, *names):
    """Latents of `branches` of a graph, each sampled with its codes kept under its name."""
    for name in names:
        keep_codes(graph, f"{name}_sampler", name)
    return latents(server, graph, *names)


def taking(server, graph, name, positive, negative=""):
    """Latents of the branch `name` on the codes kept under other names, each a code that the branch's own
    values round to."""
    outputs = server.run(take_codes(graph, f"{name}_sampler", positive, negative))
    took_codes(outputs, f"{name}_sampler")
    return server.latents(outputs, name)


@pytest.mark.arithmetic
@pytest.mark.parametrize("kind", FILES)
def test_image_of_a_batch_is_the_image_alone(server, packed, kind):
    """Activations are quantized token by token, so that no image sees another: on the codes of the images
    alone the batch differs by rounding, and its own values give those codes."""
    case = FILES[kind]
    case = case | {
        "latent": node(case["latent"]["class_type"], **(case["latent"]["inputs"] | {"batch_size": 3}))
    }
    extra = {
        f"one{i}": node("LatentFromBatch", samples=["latent", 0], batch_index=i, length=1) for i in range(3)
    }  # keeps the noise
    singles = {f"single{i}": ("load", {"latent_image": [f"one{i}", 0]}) for i in range(3)}
    alone = keeping(server, branches(case, {"load": packed[kind]}, extra, **singles), *singles)
    together = taking(
        server, branches(case, {"load": packed[kind]}, batch=("load", {})), "batch", " ".join(singles)
    )
    assert together.shape[0] == 3
    assert relative_error(together[:1], together[1:2]) > 0.1
    for i in range(3):
        assert relative_error(alone[i], together[i : i + 1]) < ROUNDING


@pytest.mark.arithmetic
@pytest.mark.parametrize("kind", FILES)
def test_guidance_is_linear_in_its_two_predictions(server, packed, kind):
    """At one step the latents at cfg 4 follow from those of the prompt and of the negative prompt, each
    sampled alone, on the same codes."""
    extra = {"negative": NEGATIVE["pixart" if kind == "pixart" else "flux"]}
    alone = {"positive": ("load", {}), "negative_alone": ("load", {"positive": ["negative", 0]})}
    guided = {"guided": ("load", {"negative": ["negative", 0], "cfg": 4.0})}
    graph = lambda runs: branches(FILES[kind], {"load": packed[kind]}, extra, steps=1, **runs)
    positive, negative = keeping(server, graph(alone), *alone)
    guided = taking(server, graph(guided), "guided", "positive", "negative_alone")
    assert relative_error(positive, negative) > 0.01
    assert relative_error(negative + 4 * (positive - negative), guided) < ROUNDING
    assert relative_error(positive, guided) > 0.02


def test_guider_and_custom_sampler_are_the_stock_sampler(server, packed):
    extra = {
        "negative": NEGATIVE["flux"],
        "noise": node("RandomNoise", noise_seed=3),
        "guider": node("CFGGuider", model=["load", 0], positive=["prompt", 0], negative=["negative", 0],
        cfg=4.0),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["load", 0], scheduler="simple", steps=2, denoise=1.0),
        "custom": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0],
        sampler=["euler", 0], sigmas=["sigmas", 0], latent_image=["latent", 0]),
        "out": node("SaveLatent", samples=["custom", 0], filename_prefix="custom"),
    }  # fmt: skip
    graph = branches(
        FLUX_TINY,
        {"load": packed["svdquant"]},
        extra,
        stock=("load", {"negative": ["negative", 0], "cfg": 4.0}),
    )
    stock, custom = latents(server, graph, "stock", "out")
    assert torch.equal(stock, custom)


# patch: gain of the one that changes something. The attention override that changes nothing sums in another
# order.
PATCHES = {
    "double block": 0.7, "single block": 0.7, "attn1_patch": 4.0, "attn1_output_patch": 0.5,
    "attention override": 0.3,
    "function wrapper": 0.9,
}  # fmt: skip


@pytest.mark.arithmetic
@pytest.mark.parametrize("patch", PATCHES)
def test_patches_act_as_on_the_full_model_and_stay_in_their_branch(server, packed, patch):
    gain = PATCHES[patch]
    models = {"load": packed["svdquant"], "full": FULL}
    extra = {
        "same": node("TestModelPatch", model=["load", 0], patch=patch, gain=0.0),
        "moved": node("TestModelPatch", model=["load", 0], patch=patch, gain=gain),
        "full_moved": node("TestModelPatch", model=["full", 0], patch=patch, gain=gain),
    }
    # The patched branches stand before the plain ones, which must not see them.
    runs = {f"of_{m}": (m, {}) for m in ("moved", "same", "load", "full_moved", "full")}
    (alone,) = keeping(
        server, branches(FLUX_TINY, {"load": packed["svdquant"]}, steps=1, alone=("load", {})), "alone"
    )
    graph = take_codes(branches(FLUX_TINY, models, extra, steps=1, **runs), "of_same_sampler", "alone")
    outputs = server.run(graph)
    moved, same, plain, full_moved, full = (server.latents(outputs, name) for name in runs)
    assert torch.equal(plain, alone)
    took_codes(outputs, "of_same_sampler", EDGE if patch == "attention override" else 1e-9)
    assert (
        relative_error(plain, same) < ROUNDING if patch == "attention override" else torch.equal(plain, same)
    )
    assert relative_error(full, full_moved) > 0.1
    assert (
        cosine(moved - plain, full_moved - full) > 0.8
    )  # 0.83 measured for attn1_patch, 0.94 for the next; quantization noise


@pytest.fixture(scope="module")
def control_net(server):
    """A random FLUX ControlNet of the small model's width, in the layout of XLabs."""
    shapes = {k: s for k, s in flux_shapes(1, 0, 256, 128, 128).items() if not k.startswith("final_layer")}
    shapes |= {"controlnet_blocks.0.weight": (256, 256), "controlnet_blocks.0.bias": (256,)}
    shapes |= {"pos_embed_input.weight": (256, 64), "pos_embed_input.bias": (256,)}
    inputs = (3, 16, 16, 16, 16, 16, 16, 16)
    for i, channels in enumerate(inputs):
        shapes |= {
            f"input_hint_block.{2 * i}.weight": (16, channels, 3, 3),
            f"input_hint_block.{2 * i}.bias": (16,),
        }
    folder = server.base / "models" / "controlnet"
    folder.mkdir(exist_ok=True)
    save_file(random_state(shapes, gain=1.0), folder / "control.safetensors")
    return node("ControlNetLoader", control_net_name="control.safetensors")


def test_control_net_acts_as_on_the_full_model(server, packed, control_net):
    extra = {
        "net": control_net,
        "picture": node("TestNoise", size=128, seed=4),
        "controlled": node("ControlNetApplyAdvanced", positive=["prompt", 0], negative=["prompt", 0],
        control_net=["net", 0], image=["picture", 0], strength=1.0, start_percent=0.0, end_percent=1.0),
    }  # fmt: skip
    under = {"positive": ["controlled", 0], "negative": ["controlled", 1]}
    runs = {
        "moved": ("load", under),
        "plain": ("load", {}),
        "full_moved": ("full", under),
        "full_plain": ("full", {}),
    }
    graph = branches(FLUX_TINY, {"load": packed["svdquant"], "full": FULL}, extra, steps=1, **runs)
    moved, plain, full_moved, full = latents(server, graph, *runs)
    assert relative_error(full, full_moved) > 1
    assert cosine(moved - plain, full_moved - full) > 0.98  # 0.996 measured


def test_shifted_schedule_after_load(server, packed):
    """ModelSamplingFlux behind the loader: as on the full model. 0.88 measured, over four steps."""
    shift = lambda model: node(
        "ModelSamplingFlux", model=[model, 0], max_shift=4.0, base_shift=4.0, width=512, height=512
    )
    models = {"load": packed["svdquant"], "full": FULL}
    runs = {
        "moved": ("shifted", {}),
        "plain": ("load", {}),
        "full_moved": ("full_shifted", {}),
        "full_plain": ("full", {}),
    }
    graph = branches(
        FLUX_TINY, models, {"shifted": shift("load"), "full_shifted": shift("full")}, steps=4, **runs
    )
    moved, plain, full_moved, full = latents(server, graph, *runs)
    assert relative_error(full, full_moved) > 0.1
    assert cosine(moved - plain, full_moved - full) > 0.8


def test_models_of_one_graph_are_each_their_own(server, packed):
    """Two quantizations of FLUX and a PixArt, in turns; and the same graph again gives the same bits."""
    flux = {k: packed[k] for k in ("svdquant", "convrot")}
    graph = branches(FLUX_TINY, flux, a=("svdquant", {}), b=("convrot", {}), c=("svdquant", {"seed": 9}))
    other = branches(PIXART, {"pixart": packed["pixart"]}, d=("pixart", {}))
    graph |= {f"p_{k}" if k in ("latent", "prompt") else k: n for k, n in other.items()}
    graph["d_sampler"]["inputs"] |= {
        "positive": ["p_prompt", 0],
        "negative": ["p_prompt", 0],
        "latent_image": ["p_latent", 0],
    }
    together = latents(server, graph, *"abcd")
    for first, second in zip(together, latents(server, graph, *"abcd"), strict=True):
        assert torch.equal(first, second)
    assert relative_error(together[0], together[1]) > 0.01
    for (kind, name, inputs), got in zip((("svdquant", "a", {}), ("convrot", "b", {}), ("svdquant", "c",
    {"seed": 9}), ("pixart", "d", {})), together, strict=True):  # fmt: skip
        (alone,) = latents(
            server, branches(FILES[kind], {"load": packed[kind]}, alone=("load", inputs)), "alone"
        )
        assert torch.equal(alone, got), name
