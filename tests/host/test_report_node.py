"""Nibble Report on the small FLUX, and the pictures of Quantize, Guard and Inspect, in ComfyUI's own code."""

import csv
import io

import pytest
import torch

from comfyui_nibble.quant_core.charts.style import DARK, LIGHT, rgb
from comfyui_nibble.quant_core.families import FLUX


@pytest.fixture(scope="module")
def calibration(comfy, full, one_thread, tmp_path_factory):
    """Four samples of three steps."""
    import folder_paths

    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    g = torch.Generator().manual_seed(0)
    prompts = [
        [torch.randn(1, 8, 128, generator=g), {"pooled_output": torch.randn(1, 128, generator=g)}]
        for _ in range(4)
    ]
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    settings = ("euler", "simple", 3, 1.0, 0, 4, 4.0, False)
    return NibbleCalibrate.execute(full, {"positive0": prompts}, latent, *settings).args[0]


@pytest.fixture(scope="module")
def quantized(full, calibration):
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    return NibbleQuantize.execute(full, "rtn", 0, False, calibration).args


@pytest.fixture
def report(comfy, tmp_path, monkeypatch):
    """The node: (picture, markdown, csv)."""
    import folder_paths

    from comfyui_nibble.nodes.report import NibbleReport

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return lambda *args, **options: NibbleReport.execute(*args, **options).args


def is_a_picture(pixels, theme=DARK):
    """Of the width of every drawing, on the theme's background, with something on it."""
    assert (pixels.ndim, pixels.shape[0], pixels.shape[2], pixels.shape[3]) == (4, 1, 960, 3)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert (pixels[0, 0, 0] * 255).round().tolist() == (rgb(theme.background) * 255).round().tolist()
    assert len((255 * pixels[..., 0]).byte().unique()) > 20
    return True


def test_a_quantized_model_is_reported(report, quantized):
    model, text, beside = quantized
    picture, markdown, table = report(model, "overview", "dark")
    assert is_a_picture(picture)
    assert is_a_picture(beside)
    assert torch.equal(picture, beside)  # one drawing, wherever it is shown
    lines = markdown.splitlines()
    assert lines[0] == "### FLUX.1, Round to nearest (baseline)"
    assert lines[1].startswith(f"**{text.splitlines()[1].split(':')[0]}.** ")
    assert sum(line.startswith(("| double ", "| single ")) for line in lines) == 5
    assert max(line.count("|") for line in lines) == 4  # three columns at most
    rows = list(csv.DictReader(io.StringIO(table)))
    found = {row["layer"]: row for row in rows}
    assert {layer.name for layer in FLUX.layers(_shapes(rows))} <= set(found)
    worst = min((r for r in rows if r["error_db"]), key=lambda r: float(r["error_db"]))
    assert f"{float(worst['error_db']):.1f}" in markdown
    assert f"{float(worst['error_db']):.2f}  " in text
    assert found["img_in"]["stored"] == "16 bit"
    assert found["img_in"]["note"] == "first or last projection, kept by the map"
    # By the CPU, the one or the other.
    kernels = {row["kernel"] for row in rows if row["stored"] != "16 bit"}
    assert kernels <= {"eager", "int8 products of torch"}
    assert "needs calibration and original" in lines[-1]


def _shapes(rows):
    return {f"{r['layer']}.weight": (int(r["out_features"]), int(r["in_features"])) for r in rows}


def test_every_map_and_theme(report, quantized):
    heights = {}
    for show in ("kernel", "all"):
        picture, *_ = report(quantized[0], show, "light")
        assert is_a_picture(picture, LIGHT)
        heights[show] = picture.shape[1]
    assert heights["all"] > 3 * heights["kernel"]


def test_the_error_over_the_steps(report, quantized, calibration, full):
    picture, markdown, _ = report(quantized[0], "error", "dark", calibration, full)
    without, *_ = report(quantized[0], "error", "dark")
    assert picture.shape[1] == without.shape[1] + 440 + 34
    assert "needs calibration" not in markdown


def test_refusals(report, quantized, calibration, full):
    with pytest.raises(ValueError, match="model at 'model' was not quantized by Nibble, found ModelPatcher"):
        report(full, "overview", "dark")
    with pytest.raises(ValueError, match="'calibration' is connected and 'original' is not"):
        report(quantized[0], "overview", "dark", calibration)
    with pytest.raises(ValueError, match="'original' is connected and 'calibration' is not"):
        report(quantized[0], "overview", "dark", original=full)
    lora = full.clone()
    lora.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.ones(256, 64),))})
    with pytest.raises(ValueError, match="was made with model"):
        report(quantized[0], "overview", "dark", calibration, lora)


def test_guard_and_inspect_draw_it_too(comfy, quantized, calibration, full, tmp_path, monkeypatch):
    import folder_paths

    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.guard import NibbleGuard
    from comfyui_nibble.nodes.inspect import NibbleInspect

    settings = ("memory (MiB)", 20.0, 0.0, "layer", True, True, False)
    model, text, picture = NibbleGuard.execute(full, quantized[0], calibration, *settings).args
    assert is_a_picture(picture)
    assert "Asked for: the least error at 0.0 KiB more or less" in text
    assert not torch.equal(picture[:, :, :600], quantized[2][:, : picture.shape[1], :600])
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    path = NibbleSaveModel.execute(model, "q").args[0]
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda *_: path)
    text, picture = NibbleInspect.execute("q").args
    assert is_a_picture(picture)
    assert "runs on this machine" in text
