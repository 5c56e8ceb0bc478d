"""Draws the templates' pictures from runs of the small model of landscapes in a real ComfyUI.

`python -m comfyui_nibble.tests.host.templates.thumbnails` writes workflows/*.jpg, in some minutes.
"""

import csv
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_nibble.quant_core.evaluation.demo import landscape_flux, landscapes
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.graphs import node, sampling
from comfyui_nibble.tests.host.server import Server, find_comfyui
from comfyui_nibble.tests.host.templates import cards
from comfyui_nibble.tests.host.templates.every import TEMPLATES
from comfyui_nibble.tests.host.templates.write import FOLDER

FILE = "landscape_flux.safetensors"
METHODS = ("svdquant_r", "splitquant", "robuq", "native")
SCENES = {
    "flux": "mountains at dusk, sun middle, lake, three pines, one cabin",
    "klein": "hills at day, sun left, meadow, many pines, no cabin",
    "qwen": "mesas at dawn, sun right, lake, one pines, no cabin",
    "day": "mountains at day, sun left, lake, three pines, one cabin",
    "night": "mountains at night, moon left, lake, three pines, one cabin",
    "plain": "hills at day, sun right, lake, no pines, no cabin",
    "compare": "volcano at dusk, sun left, lake, three pines, no cabin",
    "nunchaku": "mesas at dusk, sun middle, meadow, no pines, no cabin",
    "steps": "mountains at dawn, sun right, meadow, many pines, one cabin",
    "film": "volcano at night, moon right, lake, one pines, no cabin",
    "sdxl": "hills at dusk, sun left, lake, three pines, one cabin",
    "pixart": "mesas at day, sun middle, meadow, three pines, no cabin",
    "blocks": "volcano at day, sun right, meadow, many pines, no cabin",
    "methods": "mountains at day, sun middle, meadow, many pines, one cabin",
    "export": "hills at night, moon middle, lake, many pines, one cabin",
}
# {LoRA: [(place of a word in the caption, from, to)]}
LORAS = {
    "evening": [(2, "day", "dusk")],
    "pines": [(6, "no", "many")],
}


def words(slot: int, *texts: str) -> torch.Tensor:
    """(len(texts), 128): what the model reads where each word stands at a place of the caption."""
    made = [landscapes.encode_caption(" ".join(["-"] * slot + [t]))[0][slot] for t in texts]
    return torch.stack(made)


def write_loras(folder: Path, weights: dict):
    """LoRAs of rank 1 by formula: the layers that read the caption see one word in place of another."""
    caption, pooled = landscapes.encode_caption(SCENES["plain"])
    for name, [(slot, old, new)] in LORAS.items():
        before, after = words(slot, old, new)
        # A direction that answers to this word of the caption and to none of its others.
        others = torch.stack([token for i, token in enumerate(caption) if i != slot])
        answer = torch.linalg.lstsq(
            torch.cat([before[None], others]), torch.eye(len(caption))[:, :1], driver="gelsd"
        ).solution[:, 0]
        lora = {}
        for layer, share, reads in (
            ("txt_in", after - before, answer),
            ("vector_in.in_layer", (after - before) / len(caption) ** 0.5, pooled / pooled.square().sum()),
        ):
            lora[f"diffusion_model.{layer}.lora_A.weight"] = reads[None].contiguous()
            lora[f"diffusion_model.{layer}.lora_B.weight"] = (weights[f"{layer}.weight"].float() @ share)[
                :, None
            ]
        save_file(lora, folder / f"{name}.safetensors")


def quantized(method: str, **more) -> dict:
    """Nibble Quantize on the graph's model."""
    values = {"method": method, "rank": 32, "gptq": True, "training": "none"} | more
    return node("NibbleQuantize", model=["load", 0], calibration=["calibrate", 0], **values)


def base() -> dict:
    """The model, its ends, and one calibration for all."""
    captions = "\n".join(SCENES.values())
    return {
        "load": node("UNETLoader", unet_name=FILE, weight_dtype="default"),
        "clip": node("TestLandscapeTextEncoder"),
        "vae": node("TestLandscapeVAE"),
        "latent": node("EmptySD3LatentImage", width=256, height=256, batch_size=1),
        "prompts": node("NibbleCalibrationPrompts", clip=["clip", 0], prompts=captions, count=16),
        "calibrate": node(
            "NibbleCalibrate", model=["load", 0], latent_image=["latent", 0],
            **{"conditioning.positive0": ["prompts", 0]}, sampler_name="euler", scheduler="simple", steps=12,
            cfg=1.0, seed=0, samples=16, memory_gb=4.0, second_moments=True,
        ),
        **{method: quantized(method) for method in METHODS},
        "one lora": with_lora("svdquant_r", "evening"),
        "two loras": with_lora("one lora", "pines"),
    }  # fmt: skip


def with_lora(model: str, name: str) -> dict:
    """ComfyUI's own loader."""
    file = f"{name}.safetensors"
    return node("LoraLoaderModelOnly", model=[model, 0], lora_name=file, strength_model=1.0)


# name of a picture -> (model, scene, seed)
BOTH = ("flux", "klein", "qwen", "compare")
FOUR_BIT = (*BOTH, "day", "night", "plain", "nunchaku", "steps", "sdxl", "pixart", "blocks")
SHOTS = {
    **{f"{scene} 16": ("load", scene, 1) for scene in (*BOTH, "methods")},
    **{f"{scene} 4": ("svdquant_r", scene, 1) for scene in FOUR_BIT},
    **{f"film {i}": ("svdquant_r", "film", i) for i in (3, 4, 5)},
    **{f"methods {method}": (method, "methods", 1) for method in METHODS[:3]},
    "lora 1": ("one lora", "plain", 1),
    "lora 2": ("two loras", "plain", 1),
    "export native": ("native", "export", 1),
}


def shots(server: Server) -> dict[str, np.ndarray]:
    """All pictures, (128, 128, 3) in [0, 1]."""
    graph = base()
    for name, (model, scene, seed) in SHOTS.items():
        graph[f"{name} text"] = node("CLIPTextEncode", clip=["clip", 0], text=SCENES[scene])
        graph[name] = sampling([model, 0], [f"{name} text", 0], ["latent", 0], seed=seed, steps=14)
        graph[f"{name} decoded"] = node("VAEDecode", samples=[name, 0], vae=["vae", 0])
        graph[f"{name} saved"] = node("SaveImage", images=[f"{name} decoded", 0], filename_prefix="card")
    outputs = server.run(graph)
    return {name: opened(server, outputs[f"{name} saved"]["images"][0]) for name in SHOTS}


def opened(server, item) -> np.ndarray:
    """A saved picture."""
    with Image.open(server.base / item["type"] / item["subfolder"] / item["filename"]) as picture:
        return np.asarray(picture.convert("RGB"), np.float32) / 255


def layers(server: Server) -> tuple[list[dict], list[int]]:
    """(rows of the report of svdquant_r, activation bits of a budget layer by layer)"""
    graph = base()
    graph = {key: n for key, n in graph.items() if key not in ("one lora", "two loras", *METHODS[1:])}
    graph |= {
        "report": node("NibbleReport", model=["svdquant_r", 0], show="overview", theme="dark"),
        "csv": node("PreviewAny", source=["report", 2]),
        "allocate": node(
            "NibbleAllocateBits", model=["load", 0], calibration=["calibrate", 0], budget="A3", menu="robuq",
            use_gains=False, rank=32, gptq=False,
        ),
        "save": node(
            "NibbleSaveModel", model=["allocate", 0], filename_prefix="diffusion_models/budget", base3=False
        ),
    }  # fmt: skip
    outputs = server.run(graph)
    rows = [row for row in csv.DictReader(outputs["csv"]["text"][0].splitlines()) if row["error_db"]]
    [path] = (server.base / "output" / "diffusion_models").glob("budget*.safetensors")
    specs = [spec for spec in PackFile(path).specs.values() if not spec.weight_only]
    return rows, [spec.parts[0].activation.bits for spec in specs]


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far b is from a, amplified, as Nibble Compare has it."""
    from comfyui_nibble.quant_core.charts import pictures

    apart = pictures.difference(torch.from_numpy(a), torch.from_numpy(b))
    return pictures.colored(apart, pictures.amplification([apart])).numpy()


def heat(rows: list[dict]) -> np.ndarray:
    """How far each layer is below the others, in dB: a cell a layer, four in a row."""
    errors = [-float(row["error_db"]) for row in rows]
    errors += [np.nan] * (-len(errors) % 4)
    return np.array(errors).reshape(-1, 4)


def draw(of: dict, rows, bits) -> dict[str, Image.Image]:
    """{key of a template: its card}"""
    import matplotlib

    colours = lambda share: tuple(round(255 * c) for c in matplotlib.colormaps["cividis"](share)[:3])
    both = lambda scene: [of[f"{scene} 16"], of[f"{scene} 4"]]
    errors = [10 ** (-float(row["error_db"]) / 20) for row in rows]  # noise against signal
    worst = set(np.argsort(errors)[-2:].tolist())
    return {
        "flux_one_node": cards.panes(both("flux"), ["16 bit", "4 bit"], "FLUX.1"),
        "klein_one_node": cards.panes(both("klein"), ["16 bit", "4 bit"], "FLUX.2 Klein"),
        "qwen_one_node": cards.panes(both("qwen"), ["16 bit", "4 bit"], "Qwen-Image"),
        "edit_one_node": cards.panes([of["day 4"], of["night 4"]], ["before", "edited"], "Qwen Edit"),
        "flux_4bit_two_loras": cards.panes(
            [of["plain 4"], of["lora 1"], of["lora 2"]], ["none", "one", "two"], "LoRAs"
        ),
        "flux_compare": cards.panes(
            [*both("compare"), difference(*both("compare"))], ["16 bit", "4 bit", "apart"], "Compare"
        ),
        "flux_report": cards.cells(heat(rows), colours, "Report"),
        "flux_nunchaku": cards.whole(of["nunchaku 4"], "nunchaku", "INT4 file"),
        "flux_4bit": cards.steps(of["steps 4"], "FLUX.1"),
        "wan_4bit": cards.rows([of[f"film {i}"] for i in (3, 4, 5)], "Wan video"),
        "sdxl_4bit": cards.steps(of["sdxl 4"], "SDXL"),
        "pixart_4bit": cards.steps(of["pixart 4"], "PixArt"),
        "flux_find_blocks": cards.bars(errors, "Find blocks", worst, of["blocks 4"]),
        "flux_three_methods": cards.panes(
            [of[f"methods {m}"] for m in METHODS[:3]], ["SVD", "Split", "RobuQ"], "3 methods"
        ),
        "flux_splitquant_trained": cards.panes(
            [of["methods splitquant"], of["methods 16"]], ["start", "goal"], "Training"
        ),
        "flux_robuq_budget": cards.bars(bits, "Bit budget"),
        "flux_export_native": cards.whole(of["export native"], "Export", "for ComfyUI alone"),
    }


def main():
    folder = Path(tempfile.mkdtemp())
    server = Server(find_comfyui(), folder)
    shutil.copy(landscape_flux.MODEL.checkpoint, folder / "models" / "diffusion_models" / FILE)
    from safetensors.torch import load_file

    write_loras(folder / "models" / "loras", load_file(landscape_flux.MODEL.checkpoint))
    with server:
        of, (rows, bits) = shots(server), layers(server)
    for old in FOLDER.glob("*.jpg"):
        old.unlink()
    titles = {template.key: template.title for template in TEMPLATES}
    for key, card in draw(of, rows, bits).items():
        card.save(FOLDER / f"{titles[key]}.jpg", quality=82, optimize=True)


if __name__ == "__main__":
    main()
