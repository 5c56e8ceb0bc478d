"""The prediction of docs/scale.md."""

from pathlib import Path

from comfyui_nibble.quant_core.evaluation import large_run
from comfyui_nibble.quant_core.families.flux2 import FLUX2
from comfyui_nibble.tests.assets.synthetic import flux2_shapes

PAGE = Path(__file__).resolve().parents[3] / "docs" / "scale.md"


def test_the_layers_are_those_of_flux2_dev():
    assert large_run.layers() == FLUX2.layers(flux2_shapes(large_run.DOUBLE, large_run.SINGLE))


def test_page_is_fresh():
    """Where it is not: `python -m comfyui_nibble.quant_core.evaluation.large_run`, whose table goes there."""
    assert large_run.table() in PAGE.read_text(encoding="utf-8")
