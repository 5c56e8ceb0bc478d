"""The pictures of the help pages: each node as ComfyUI's frontend draws it, with what it is wired to.

`python -m comfyui_nibble.tests.pictures.help` starts a ComfyUI and draws them into nodes/web/docs/pictures/,
in English and, for the pages that are translated, in Chinese (which needs a font that has it, such as
fonts-wqy-microhei).
"""

import io
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from comfyui_nibble.tests.host.browser import opened
from comfyui_nibble.tests.host.server import PACK, Server, find_comfyui

PAGES = PACK / "nodes" / "web" / "docs"
FOLDER = PAGES / "pictures"
SCALE = 1.4  # pixels of the picture for one of the graph: the panel shows it at about 0.6
MARGIN = 24
PLACE = (420, 120)  # of the picture on the page, away from ComfyUI's own bars
MODEL, CLIP, LOAD = "UNETLoader", "CLIPLoader", "NibbleLoadDiffusionModel"


@dataclass(frozen=True)
class Use:
    """A node in use: what is wired into it and what takes its outputs, and values of its widgets."""

    sources: tuple[tuple[str, str], ...] = ()  # (kind of node, the input that it goes into)
    targets: tuple[tuple[str, int, str], ...] = ()  # (kind of node, number of the output, its input)
    values: dict = field(default_factory=dict)


CALIBRATED = ((MODEL, "model"), ("NibbleCalibrate", "calibration"))
TO_SAMPLER = ("KSampler", 0, "model")
TO_SAVE = ("NibbleSaveModel", 0, "model")
REPORT = ("PreviewAny", 1, "source")
USES = {
    "NibbleQuantizeForMyCard": Use(
        ((MODEL, "model"), (CLIP, "clip")),
        (("LoraLoaderModelOnly", 0, "model"), ("PreviewImage", 3, "images")),
    ),
    "NibbleCompare": Use(
        (
            (MODEL, "model_a"),
            (LOAD, "model_b"),
            ("CLIPTextEncode", "positive"),
            ("EmptySD3LatentImage", "latent_image"),
        ),
        (("SaveImage", 0, "images"), ("PreviewAny", 3, "source")),
    ),
    "NibbleReport": Use((("NibbleQuantize", "model"),), (("SaveImage", 0, "images"), REPORT)),
    "NibbleLoadDiffusionModel": Use(
        targets=(("LoraLoaderModelOnly", 0, "model"), TO_SAMPLER),
        values={"model_name": "flux1-dev-4bit_00001_.safetensors"},
    ),
    "NibbleCalibrate": Use(
        (
            (MODEL, "model"),
            ("NibbleCalibrationPrompts", "conditioning.positive0"),
            ("EmptySD3LatentImage", "latent_image"),
        ),
        (("NibbleQuantize", 0, "calibration"),),
    ),
    "NibbleCalibrationPrompts": Use(
        ((CLIP, "clip"),),
        (("NibbleCalibrate", 0, "conditioning.positive0"),),
        {"prompts": "my cat in a spacesuit\na red bicycle in the rain, photo\na lighthouse"},
    ),
    "NibbleQuantize": Use(CALIBRATED, (TO_SAMPLER, TO_SAVE, REPORT)),
    "NibbleAllocateBits": Use(
        CALIBRATED, (TO_SAVE, REPORT, ("PreviewImage", 2, "images")), {"budget": "6.5GB"}
    ),
    "NibbleGuard": Use(
        ((MODEL, "model"), ("NibbleQuantize", "quantized"), ("NibbleCalibrate", "calibration")),
        (TO_SAVE, REPORT),
    ),
    "NibbleBakeLora": Use((("LoraLoaderModelOnly", "model"),), (TO_SAVE, REPORT)),
    "NibbleSaveModel": Use(
        (("NibbleQuantize", "model"),), values={"filename_prefix": "diffusion_models/my_flux_4bit"}
    ),
    "NibbleExportModel": Use((("NibbleQuantize", "model"),), (REPORT,)),
    "NibbleInspect": Use(
        targets=(("PreviewAny", 0, "source"),), values={"model_name": "svdq-int4_r32-flux.1-dev.safetensors"}
    ),
    "NibbleSwapBlocks": Use(
        (("NibbleQuantize", "model_a"), (MODEL, "model_b")),
        (TO_SAMPLER, REPORT),
        {"blocks": "double 0-3\nsingle 5,7,9\n*.mlp"},
    ),
}

# Neighbours are collapsed, above on the left and below on the right, so that the picture is narrow.
LAY_OUT = """([kind, use]) => {
    const graph = app.graph, rise = 46
    graph.clear()
    // The frontend keeps widgets' values by the number of their node, also of one that is gone.
    graph.state.lastNodeId = window.numbered = (window.numbered ?? 0) + 100
    const add = (kind, x, y) => {
        const node = LiteGraph.createNode(kind)
        node.pos = [x, y]
        graph.add(node)
        return node
    }
    const shift = use.sources.length ? 100 : 0
    const top = use.sources.length * rise + (use.sources.length ? 40 : 0)
    const node = add(kind, shift, top)
    node.size = [Math.max(270, node.computeSize()[0]), node.computeSize()[1]]
    for (const [name, value] of Object.entries(use.values)) {
        node.widgets.find(w => w.name === name).value = value
    }
    use.sources.forEach(([source, input], n) => {
        const made = add(source, 0, n * rise)
        const to = node.inputs.findIndex(i => i.name === input)
        made.connect(Math.max(0, made.outputs.findIndex(o => o.type === node.inputs[to].type)), node, to)
        made.flags.collapsed = true
    })
    const bottom = top + node.size[1] + 52
    const ends = use.targets.map(([target, output, input], n) => {
        const made = add(target, shift + node.size[0] - 70, bottom + n * rise)
        node.connect(output, made, made.inputs.findIndex(i => i.name === input))
        made.flags.collapsed = true
        return made
    })
    const low = ends.length ? bottom + (ends.length - 1) * rise : top + node.size[1]
    // A collapsed node is as wide as its title, which is only measured when it is drawn.
    const letter = c => c > "\u2000" ? 14 : 7.5
    const wide = made => made.pos[0] + 56 + [...made.title].reduce((sum, c) => sum + letter(c), 0)
    return [Math.max(shift + node.size[0], ...ends.map(wide)), low]
}"""
SHOW = """([scale, x, y]) => {
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [x / scale, y / scale]
    app.canvas.setDirty(true, true)
}"""


def drawn(page, kind: str) -> Image.Image:
    """The node of a kind in use, in the frontend of a page."""
    use = USES[kind]
    width, height = page.evaluate(LAY_OUT, [kind, asdict(use)])
    left, top = PLACE
    # Above the first node is its title, 30 high, and a badge.
    page.evaluate(SHOW, [SCALE, left + MARGIN * SCALE, top + (MARGIN + 44) * SCALE])
    page.wait_for_timeout(700)
    clip = {
        "x": left,
        "y": top,
        "width": round((width + 2 * MARGIN) * SCALE),
        "height": round((height + 2 * MARGIN + 44) * SCALE),
    }
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def draw(server, language: str, kinds):
    """Pictures of these kinds of nodes into FOLDER, with the frontend in a language."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    ending = "" if language == "en" else f".{language}"
    settings = {
        "Comfy.Locale": language,
        "Comfy.ColorPalette": "dark",
        "Comfy.VueNodes.Enabled": False,
        "Comfy.Minimap.Visible": False,
    }
    with opened(server, 1500, 1500, settings) as page:
        for kind in kinds:
            drawn(page, kind).save(FOLDER / f"{kind}{ending}.webp", quality=70, method=6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        server = Server(find_comfyui(), Path(base))
        for use in USES.values():
            if name := use.values.get("model_name"):  # else the frontend marks the file as missing
                (Path(base) / "models" / "diffusion_models" / name).touch()
        with server:
            draw(server, "en", sorted(p.stem for p in PAGES.glob("*.md")))
            draw(server, "zh", sorted(p.parent.name for p in PAGES.glob("*/zh.md")))
