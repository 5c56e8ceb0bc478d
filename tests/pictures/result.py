"""The picture on top of the README: one model in 16 bit, by Nibble in 4 bits, and rounded to 4 bits, on the
same seeds. `python -m comfyui_nibble.tests.pictures.result` draws it into docs/pictures/.

The model's activations have the hard outliers of `nibble demo`, by a transform that leaves its function
alone: without them rounding would do, as it does for no real model.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from comfyui_nibble.quant_core.evaluation.demo import metrics
from comfyui_nibble.quant_core.evaluation.demo.landscape_flux import MODEL as SMALL
from comfyui_nibble.quant_core.evaluation.demo.outliers import add_outliers
from comfyui_nibble.quant_core.evaluation.demo.run import SEVERITIES, STEPS, calibrate_tiny, quantized_copy
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.pictures.logo import DARK, FOLDER, LIGHT, MUTED

ROWS = {"svdquant_r": "4 bits, by Nibble", "rtn": "4 bits, rounded"}
SHOWN = SMALL.world.CAPTIONS[:6]
SIDE, GAP, MARGIN, LABEL = 192, 10, 28, 190  # pixels: a picture, between two, around all, the names
SEED = 7


def sampled() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the original's pictures, {method: the quantized model's}): each (N, h, w, 3) in 0 to 1."""
    state = add_outliers(load_file(SMALL.checkpoint), SEVERITIES["hard"])
    model = SMALL.load(state)
    layers = FLUX.layers({k: tuple(t.shape) for k, t in state.items()})
    drawn = lambda network: SMALL.world.decode(SMALL.sample(network, SHOWN, STEPS, seed=SEED))
    with tempfile.TemporaryDirectory() as folder:
        calibration = calibrate_tiny(model, layers, Path(folder), small=SMALL)
        made = {
            name: drawn(quantized_copy(model, layers, state, METHODS[name], calibration)[0]) for name in ROWS
        }
    return drawn(model), made


def sheet(reference: torch.Tensor, made: dict[str, torch.Tensor]) -> Image.Image:
    """A row for the original and one for each method, with its name and how far its pictures are away."""
    rows = [("16 bit", "the original", reference)]
    for name, got in made.items():
        title, _, how = ROWS[name].partition(", ")
        rows.append((title, f"{how}\n{metrics.psnr_db(reference, got, 1.0):.0f} dB", got))
    width = 2 * MARGIN + LABEL + len(SHOWN) * (SIDE + GAP) - GAP
    height = 2 * MARGIN + len(rows) * (SIDE + GAP) - GAP
    picture = Image.new("RGB", (width, height), DARK)
    pen = ImageDraw.Draw(picture)
    for n, (title, text, shown) in enumerate(rows):
        y = MARGIN + n * (SIDE + GAP)
        pen.text((MARGIN, y + 52), title, LIGHT, ImageFont.load_default(34))
        pen.multiline_text((MARGIN, y + 98), text, MUTED, ImageFont.load_default(24), spacing=8)
        for column, pixels in enumerate(shown):
            tile = Image.fromarray((pixels * 255).round().byte().numpy())
            x = MARGIN + LABEL + column * (SIDE + GAP)
            picture.paste(tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
    return picture


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    sheet(*sampled()).save(FOLDER / "result.jpg", quality=88, optimize=True)
