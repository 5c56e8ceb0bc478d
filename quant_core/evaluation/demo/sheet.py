"""The contact sheet of `nibble demo`: a row for each method, mild outliers on the left and hard ones on the
right."""

from pathlib import Path
from textwrap import wrap

import torch

from ...store.atomic import replacing

SHOWN = 4  # pictures of each severity
CELL, GAP = 188, 8  # of a picture, in pixels of the sheet
SIDE, SCORE, HEAD, FOOT = 262, 92, 140, 26
BACKGROUND, TEXT, QUIET = "#15171c", "#f2f3f5", "#a3a9b5"
# From this PSNR on the pictures look the same; below the second they are another picture. Blue, amber and
# vermilion are told apart by the colour-blind; the figure stands beside.
MARKS = ((30.0, "#56b4e9"), (20.0, "#f0b429"), (float("-inf"), "#ef6a4b"))
NOTES = {"mild": "mild outliers", "hard": "hard outliers, as in big models"}


def contact_sheet(
    path: Path, shown: dict, reports: dict, titles: dict[str, str], model: str = "One model"
) -> None:
    """Writes the sheet as a PNG.

    shown: {severity: {"reference" or method: pictures (B, H, W, 3)}}; reports: {severity: what
    report.json says of it}; titles: {method: its name in words}; model: the first words of the heading.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    severities = list(shown)
    names = list(shown[severities[0]])
    block = SCORE + SHOWN * (CELL + GAP)
    width = SIDE + len(severities) * block + 2 * GAP
    height = HEAD + len(names) * (CELL + GAP) + FOOT
    figure = Figure((width / 100, height / 100), dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)

    def write(x, y, text, size, color=TEXT, **options):
        figure.text(x / width, 1 - y / height, text, fontsize=size * 0.72, color=color, **options)

    write(GAP * 3, 52, f"{model}, quantized in {len(names) - 1} ways", 34, weight="bold")
    write(
        *(GAP * 3, 86),
        "Same captions, same seeds: the closer a row is to the first, the better its method. In dB: image "
        "PSNR against full precision.",
        *(17, QUIET),
    )
    for column, severity in enumerate(severities):
        left = SIDE + column * block + SCORE
        write(left, HEAD - 14, NOTES[severity], 20, weight="bold")
        for row, name in enumerate(names):
            top = HEAD + row * (CELL + GAP)
            if column == 0:
                _label(write, top, name, titles.get(name), reports, severities)
            if (score := reports[severity]["methods"].get(name)) is not None:
                _score(write, left - GAP * 1.5, top, score["image_psnr_db"])
            _pictures(figure, (width, height), left, top, shown[severity][name][:SHOWN])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _label(write, top, name, title, reports, severities):
    """The name of a row, what it is, and how many bits a weight takes."""
    middle = top + CELL / 2
    if title is None:
        write(GAP * 3, middle - 6, "Full precision", 22, weight="bold")
        write(GAP * 3, middle + 20, "16 bits a weight", 15, QUIET)
        return
    bits = reports[severities[-1]]["methods"][name]["block_bits_per_weight"]
    lines = [*wrap(title, 29), f"{bits:.1f} bits a weight"]
    first = middle - 11 * len(lines)
    write(GAP * 3, first, name, 22, weight="bold")
    for i, line in enumerate(lines):
        write(GAP * 3, first + 26 + 22 * i, line, 15, QUIET if i == len(lines) - 1 else TEXT)


def _score(write, right, top, psnr):
    color = next(color for least, color in MARKS if psnr >= least)
    write(right, top + CELL / 2 + 2, f"{psnr:.1f}", 27, color, ha="right", weight="bold")
    write(right, top + CELL / 2 + 24, "dB", 15, color, ha="right")


def _pictures(figure, size, left, top, pictures: torch.Tensor):
    width, height = size
    for i, picture in enumerate(pictures):
        x = left + i * (CELL + GAP)
        axis = figure.add_axes((x / width, 1 - (top + CELL) / height, CELL / width, CELL / height))
        axis.imshow(picture.numpy(), interpolation="lanczos", aspect="auto")
        axis.set_axis_off()
