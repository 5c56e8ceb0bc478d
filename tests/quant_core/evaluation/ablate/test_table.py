"""The table of an ablation, and its picture, of rows that are made up."""

import pytest

from comfyui_nibble.quant_core.charts.sheet import drawn
from comfyui_nibble.quant_core.evaluation.ablate.plot import plot, sections
from comfyui_nibble.quant_core.evaluation.ablate.table import COLUMNS, ablation_text, by_factor, ordered
from comfyui_nibble.quant_core.evaluation.inputs import KINDS

pytestmark = pytest.mark.quick


def row(name, coherent, each=None, **more):
    """With the same figure in most columns."""
    figures = dict.fromkeys(COLUMNS, coherent) | {"name": name, "levels": {}, "cost": 0.0164, "cost_3072": 0}
    if each is not None:
        return figures | {"each_db": each, "ssim": 0.98765} | more
    for key in ("latent_db", "image_db", "median_db", "ssim"):
        del figures[key]
    return figures | more


# Two seeds of three pictures. "flipped" wins four of six, and loses by the mean for one picture.
ROWS = [
    row("base", 25.0, [[30.0, 31.0, 32.0], [33.0, 34.0, 35.0]], levels={"clip": False}),
    row("flipped", 24.0, [[31.0, 33.0, 12.0], [34.0, 35.0, 35.0]], levels={"clip": True}),
    row("not sampled", 40.0, levels={"clip": False}),
    row("worse", 26.0, [[29.0, 30.0, 31.5], [32.0, 33.0, 34.0]], kinds=dict.fromkeys(KINDS, 10.125)),
    row("worse coherent", 20.0),
]


def test_order_is_of_paired_medians():
    """Neither of means of pictures, in which "flipped" is last, nor of the error of predictions."""
    names = lambda *against: [found["name"] for found in ordered(ROWS, against)]
    assert names("base") == ["flipped", "base", "worse", "not sampled", "worse coherent"]
    assert names("worse")[:3] == ["flipped", "base", "worse"]
    # Without the row to compare with: by the median picture, here what `row` was given.
    assert names("not sampled")[:3] == names()[:3] == ["worse", "base", "flipped"]


def test_text():
    lines = ablation_text(ROWS, ("base", "worse", "not sampled")).splitlines()
    assert lines[0].split() == " ".join(["row", *COLUMNS.values()]).split()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        found["name"] for found in ordered(ROWS, ["base"])
    ]
    assert "0.9877" in lines[1]
    assert "1.64%" in lines[1]
    assert lines[4].split()[-8:-3] == ["-", "-", "-", "-", "40.00"]  # of what was not sampled
    at = next(i for i, line in enumerate(lines) if line.startswith("picture by picture against base"))
    # Differences 1, 2, -20 and 1, 1, 0: medians 1 and 1.
    flipped, worse = lines[at + 2 : at + 4]
    assert flipped.split()[:2] == ["flipped", "+1.00"]
    assert flipped.split()[-4:] == ["4.5", "of", "6", "0.00"]
    # -1, -1, -0.5 and -1, -1, -1.
    assert worse.split() == ["worse", "-1.00", "-1.00", "to", "-0.75", "0", "of", "6", "0.00"]
    assert lines[at + 4] == ""
    assert sum(line.startswith("picture by picture") for line in lines) == 2  # "not sampled" has none
    kinds = lines[next(i for i, line in enumerate(lines) if line.startswith("one synthetic")) + 2]
    assert kinds.split() == ["worse", *["10.12"] * len(KINDS)]
    assert lines[-1] == "mean coherent dB by clip       False: 32.50 (2)  True: 24.00 (1)"


def test_means_of_levels():
    assert by_factor(ROWS) == {"clip": {"False": (32.5, 2), "True": (24.0, 1)}}


def test_picture(tmp_path):
    made = sections(ROWS, "base")
    said = [line for section in made for line in section.words]
    assert [line.split(":")[0] for line in said if "better in" in line] == ["flipped", "worse"]
    assert "clip True: 24.00 dB" in said
    pixels, why = drawn(made)
    assert why == []
    assert pixels.shape[2] == 960
    plot(tmp_path / "a.png", ROWS, "base")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    # Nothing to compare with: no strip of intervals, and no error.
    assert len(sections(ROWS, "not sampled")) == len(made) - 1
