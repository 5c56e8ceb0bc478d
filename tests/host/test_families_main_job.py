"""Calibrate -> quantize -> save -> load -> sample in a real ComfyUI, for a small model of each family."""

from dataclasses import dataclass

import pytest

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.assets.synthetic import (
    chroma_shapes,
    flux2_shapes,
    qwen_image_shapes,
    save_random,
    sd3_shapes,
    sdxl_shapes,
    wan_shapes,
    z_image_shapes,
)
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.host.test_main_job import run_both

_PICTURE = node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
_VIDEO = node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)


@dataclass(frozen=True)
class Small:
    """bound: of the distance to full precision, above svdquant_r's own and below what `rtn` leaves (the
    comment beside it).

    text, pooled: widths. gain: of the random weights; at 0.7 the blocks hardly matter to the latents.
    second_moments: without, a K of 2048 takes a tenth of the time.
    """

    family: str
    shapes: dict
    layers: int
    bound: float
    latent: dict
    text: int = 64
    pooled: int = 0
    image_tokens: int = 0
    gain: float = 1.4
    second_moments: bool = True


CASES = {
    "flux2": Small(
        "flux2", flux2_shapes(1, 1, hidden=128, context=64), 13, 0.14,
        node("EmptyFlux2LatentImage", width=128, height=128, batch_size=1)
    ),  # 0.087; rtn 0.396
    # 0.035; rtn 0.186.
    "chroma": Small("chroma", chroma_shapes(1, 1, hidden=128, inner=64, context=64), 10, 0.08, _PICTURE),
    "sd3": Small("sd3", sd3_shapes(2, twice=1), 18, 0.18, _PICTURE, 4096, 2048),  # 0.121; rtn 0.253
    # 0.040; rtn 0.126.
    "qwen_image": Small("qwen_image", qwen_image_shapes(1, hidden=128, context=64), 14, 0.07, _PICTURE),
    # 0.138; rtn 0.296.
    "z_image": Small("z_image", z_image_shapes(1, hidden=256, context=64, refiners=1), 17, 0.2, _PICTURE),
    "wan": Small("wan", wan_shapes(), 11, 0.12, _VIDEO, 4096),  # 0.081; rtn 0.166
    # 0.082; rtn 0.215.
    "wan_i2v": Small("wan", wan_shapes(channels=36, image=True), 13, 0.13, _VIDEO, 4096, image_tokens=7),
    "wan_5B": Small("wan", wan_shapes(channels=48, out=48), 11, 0.13, _VIDEO, 4096),  # 0.084; rtn 0.223
    "wan_vace": Small("wan_vace", wan_shapes(vace=1), 23, 0.09, _VIDEO, 4096),  # 0.055; rtn 0.146
    "sdxl": Small(
        "sdxl", sdxl_shapes(), 74, 0.115, node("EmptyLatentImage", width=128, height=128, batch_size=1), 2048,
        1280,
        gain=1.0, second_moments=False,
    ),  # 0.090; rtn 0.140
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_small_model(server, name):
    case = CASES[name]
    file = f"small_{name}.safetensors"
    save_random(server.base / "models" / "diffusion_models" / file, case.shapes, gain=case.gain)
    widths = {"tokens": 12, "dim": case.text, "pooled_dim": case.pooled, "image_tokens": case.image_tokens}
    graph = {
        "model": file,
        "calibration": node("TestConditioning", seed=1, entries=2, **widths),
        "prompt": node("TestConditioning", seed=2, entries=1, **widths),
        "latent": case.latent,
    }
    options = {"samples": 2, "steps": 2, "sample_steps": 2, "second_moments": case.second_moments}
    outputs, error, path = run_both(server, graph, prefix=f"diffusion_models/{name}", **options)
    assert error < case.bound
    assert f"{case.layers} layers" in outputs["report"]["text"][0]
    pack = PackFile(path)
    assert pack.family == case.family
    assert len(pack.specs) == case.layers
