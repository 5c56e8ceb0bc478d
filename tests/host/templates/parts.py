"""Nodes that several templates have in common, each called anew for each template."""

import re

from comfyui_nibble.tests.host.templates.describe import Group, Node, node

HELP = "https://github.com/comfyui-nibble/ComfyUI-Nibble/blob/main/nodes/web/docs/"
PROMPT = (
    "a lighthouse on a rocky coast at dawn, soft mist over the sea, a small red boat in the foreground, "
    "photograph"
)
NEGATIVE = "blurry, low quality"


def help_on(*ids: str) -> str:
    """Links to the help pages of nodes."""
    words = {i: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", i.removeprefix("Nibble")) for i in ids}
    pages = ", ".join(f"[{name}]({HELP}{i}.md)" for i, name in words.items())
    return f"**Help:** {pages}, or the info button of a node."


def flux_loaders() -> tuple[Node, Node]:
    """FLUX.1 dev in 16 bit and its text encoders."""
    return (
        node("UNETLoader", unet_name="flux1-dev.safetensors"),
        node(
            "DualCLIPLoader",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl_fp16.safetensors",
            type="flux",
        ),
    )


def flux_vae() -> Node:
    """FLUX.1's decoder, which stands beside what decodes."""
    return node("VAELoader", vae_name="ae.safetensors")


def flux_calibrate(model: Node, clip: Node) -> tuple[Group, Node]:
    """The group that calibrates FLUX.1, with the same values in all templates, so that one calibration serves
    all. Without a FluxGuidance ComfyUI takes 3.5."""
    prompts = node("NibbleCalibrationPrompts", fill=True, clip=clip)
    size = node("EmptySD3LatentImage", "Size for calibration", width=1024, height=1024)
    calibrate = node(
        "NibbleCalibrate", model=model, dotted={"conditioning.positive0": prompts}, latent_image=size
    )
    return Group("2 Calibrate", [[prompts, size], [calibrate]]), calibrate


def flux_prompt(clip: Node) -> tuple[Node, Node, Node]:
    """(prompt, its guidance, the empty negative) of a picture by FLUX.1."""
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    return (
        prompt,
        node("FluxGuidance", conditioning=prompt),
        node("ConditioningZeroOut", "No negative prompt", conditioning=prompt),
    )


def picture_size(kind: str = "EmptySD3LatentImage", **values) -> Node:
    """The empty latents of the picture."""
    return node(kind, "Size of the picture", **({"width": 1024, "height": 1024} | values))


def picture(model: Node, positive: Node, negative: Node, size: Node, vae, prefix: str, **sampling) -> tuple:
    """(sampler, decoder, saver) of one picture; sampling: values of KSampler."""
    values = {"seed": 1, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"} | sampling
    sampler = node("KSampler", model=model, positive=positive, negative=negative, latent_image=size, **values)
    decoded = node("VAEDecode", samples=sampler, vae=vae)
    return sampler, decoded, node("SaveImage", fill=True, images=decoded, filename_prefix=prefix)


def report_of(source: Node, title: str = "Report") -> Node:
    """The text of a node, which its second output has."""
    return node("PreviewAny", title, fill=True, source=(source, "report"))


def for_my_card(model: Node, clip: Node | None, vae: Node | None = None, **more) -> Node:
    """The one node, which calibrates, quantizes and saves, or finds what it has saved."""
    wires = {name: wire for name, wire in (("clip", clip), ("vae", vae)) if wire is not None}
    return node("NibbleQuantizeForMyCard", fill=True, wide=400, model=model, **wires, **more)


def compare(models: list, positive: Node, size: Node, vae, title=None, wide=520, tall=420) -> Node:
    """The pictures of two or three models from one seed. The first is what the others are measured
    against."""
    wires = {f"model_{letter}": model for letter, model in zip("abc", models, strict=False)}
    asked = {"positive": positive, "latent_image": size, "vae": vae, "seed": 1}
    return node("NibbleCompare", title, fill=True, wide=wide, tall=tall, **asked, **wires)


def flux_comparison(models: list, clip: Node) -> list[list[Node]]:
    """The columns of a group that draws one prompt with models of FLUX.1."""
    prompt = node("CLIPTextEncode", "Prompt", fill=True, text=PROMPT, clip=clip)
    guidance, size, vae = node("FluxGuidance", conditioning=prompt), picture_size(), flux_vae()
    return [[prompt, guidance], [size, vae], [compare(models, guidance, size, vae)]]


def read(source: Node, *more: Node) -> list[Node]:
    """The map and the text that a node gives of its layers."""
    shown = node("PreviewImage", "Map of the layers", fill=True, wide=400, images=(source, "picture"))
    return [shown, report_of(source), *more]
