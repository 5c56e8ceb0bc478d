"""The example workflows as tests read them, and what a run of one wrote."""

import json
import re

from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.formats.nunchaku import read as nunchaku
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.quant_core.training.presets import PRESETS
from comfyui_nibble.tests.assets.synthetic import (
    random_state,
)
from comfyui_nibble.tests.host.graphs import node, sampling
from comfyui_nibble.tests.host.server import PACK
from comfyui_nibble.tests.host.templates.every import TEMPLATES

FOLDER = PACK / "workflows"
TITLES = {template.key: template.title for template in TEMPLATES}
NAMES = list(TITLES)


TRAINING = PRESETS["splitquant_4"]["standard"]
STAGES = [config for config in (TRAINING.blocks, TRAINING.distill) if config is not None]


H = 256  # hidden width of the small FLUX


def title(name):
    """Of the file, without its ending."""
    return TITLES[name]


def workflow(name):
    return json.loads((FOLDER / f"{title(name)}.json").read_text(encoding="utf-8"))


def twin(name):
    return json.loads((FOLDER / "api" / f"{title(name)}.json").read_text(encoding="utf-8"))


def note(name):
    return next(n["widgets_values"][0] for n in workflow(name)["nodes"] if n["type"] == "MarkdownNote")


def of_kind(graph, kind):
    return {key: n for key, n in graph.items() if n["class_type"] == kind}


def wan_vae_shapes():
    """Wan 2.1's, whose width ComfyUI reads off the file: 8 channels instead of 96."""
    from comfy.ldm.wan.vae import WanVAE

    made = WanVAE(
        dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    return {key: tuple(t.shape) for key, t in made.state_dict().items()}


def save_nunchaku(path, shapes):
    """The random FLUX of `shapes` by SVDQuant without data, in nunchaku's format."""
    state, method = random_state(shapes), by_name("svdquant")
    config = method.configured(rank=32, gptq=False, iterations=0)
    made = [
        layer for layer, _ in quantize_layers(detect(shapes).layers(shapes), Tensors(state), method, config)
    ]
    layers = {layer.name: layer for layer in made}
    nunchaku.save(
        path, layers, {k: t for k, t in state.items() if k.rpartition(".")[0] not in layers}, "flux", {}
    )


def shrunk(graph, pixels, **more):
    """The graph for small models: other text encoders, small pictures, few steps, `more` {kind of node:
    {input: value}}. Nothing else is touched."""
    small = {
        "NibbleCalibrationPrompts": {"count": 4},
        "NibbleCalibrate": {"steps": 2, "samples": 4},
        "EmptySD3LatentImage": {"width": pixels, "height": pixels},
        "EmptyLatentImage": {"width": pixels, "height": pixels},
        "EmptyHunyuanLatentVideo": {"width": pixels, "height": pixels, "length": 5},
        "KSampler": {"steps": 2},
        "NibbleCompare": {"steps": 2},
        "NibbleQuantizeForMyCard": {"wish": "fast", "steps": 2},
        "NibbleSwapBlocks": {"blocks": "double 0"},
    } | more
    out = {}
    for key, n in graph.items():
        if n["class_type"] in ("CLIPLoader", "DualCLIPLoader"):
            out[key] = node("TestTextEncoder", type=n["inputs"]["type"], seed=0)
        else:
            values = small.get(n["class_type"], {})
            assert values.keys() <= n["inputs"].keys()
            out[key] = n | {"inputs": n["inputs"] | values}
    for checkpoint in of_kind(graph, "CheckpointLoaderSimple"):  # the small one holds no text encoders
        for n in out.values():
            n["inputs"] = {k: ["clip", 0] if v == [checkpoint, 1] else v for k, v in n["inputs"].items()}
        out["clip"] = node("TestTextEncoder", type="sdxl", seed=0)
    return out


def size_of(server, outputs, key):
    """Of the picture that an image node wrote, which may not be of one flat colour, as NaN would give."""
    from PIL import Image

    [item] = outputs[key]["images"]
    with Image.open(server.base / item["type"] / item["subfolder"] / item["filename"]) as picture:
        assert any(low < high for low, high in picture.getextrema()[:3])
        return picture.size


def clip_of(server, outputs, key):
    """(frames, width, height) of the clip that a video node wrote, which may not be of one flat colour."""
    import av

    [item] = outputs[key]["images"]
    with av.open(server.base / item["type"] / item["subfolder"] / item["filename"]) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert all(frame.min() < frame.max() for frame in frames)
    return len(frames), frames[0].shape[1], frames[0].shape[0]


def pictures_are(server, outputs, graph, pixels):
    """Every saved picture has that size, and every comparison is a larger one."""
    for key in of_kind(graph, "SaveImage"):
        assert size_of(server, outputs, key) == (pixels, pixels)
    for key in of_kind(graph, "NibbleCompare"):
        assert min(size_of(server, outputs, key)) > pixels


def saved_name(graph, outputs, save=None):
    """Of the file that Nibble Save Model wrote; save: its key, where there are several."""
    return re.search(
        r"(\S+\.safetensors)", outputs[save or next(iter(of_kind(graph, "NibbleSaveModel")))]["text"][0]
    )[1]


def packs_of(server, graph, outputs):
    """{method, or kind of the node that made it: the saved file}"""
    folder = server.base / "output" / "diffusion_models"
    saves = of_kind(graph, "NibbleSaveModel").items()
    return {maker(graph, n): PackFile(folder / saved_name(graph, outputs, key)) for key, n in saves}


def maker(graph, n):
    """Where a node's model comes from: the method of Nibble Quantize, else the kind of node."""
    source = graph[n["inputs"]["model"][0]]
    return source["inputs"].get("method", source["class_type"])


def with_latents(graph):
    """The graph with what each KSampler gives, and what each model of a Nibble Compare and each Nibble Guard
    would give beside it, saved under `latents_` and `maker`."""
    out = dict(graph)
    for key, n in of_kind(graph, "KSampler").items():
        out[f"latents_{maker(graph, n)}"] = node("SaveLatent", samples=[key, 0], filename_prefix="workflow")
    guards = [[key, 0] for key in of_kind(graph, "NibbleGuard")]
    for n in of_kind(graph, "NibbleCompare").values():
        values = n["inputs"]
        settings = {name: values[name] for name in ("seed", "steps", "cfg")}
        compared = [values[name] for name in ("model_a", "model_b", "model_c") if name in values]
        for model in [*compared, *guards]:
            made = maker(graph, {"inputs": {"model": model}})
            out[made] = sampling(model, values["positive"], values["latent_image"], **settings)
            out[f"latents_{made}"] = node("SaveLatent", samples=[made, 0], filename_prefix="workflow")
    return out
