"""Nibble Allocate Bits on the small FLUX, in ComfyUI's own code."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from comfyui_nibble.quant_core.calibration import CalibrationError
from comfyui_nibble.quant_core.precision import menu, sensitivity
from comfyui_nibble.quant_core.precision.budget import BudgetError
from comfyui_nibble.quant_core.precision.menu import Entry
from comfyui_nibble.tests.host.inside import forward
from comfyui_nibble.tests.support import relative_error

FAST = (("smooth", ((0.5, 0.5),)), ("low_rank", ("plain",)), ("iterations", 0), ("finalists", 1))
LAYERS = 12  # and four of modulation


@pytest.fixture(scope="module")
def calibrated(comfy, full, one_thread, tmp_path_factory):
    """Nibble Calibrate on the small FLUX: four samples of two steps."""
    import folder_paths

    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    g = torch.Generator().manual_seed(0)
    prompts = [
        [torch.randn(1, 8, 128, generator=g), {"pooled_output": torch.randn(1, 128, generator=g)}]
        for _ in range(4)
    ]
    return NibbleCalibrate.execute(
        full,
        {"positive0": prompts},
        {"samples": torch.zeros(1, 16, 16, 16)},
        "euler",
        "simple",
        2,
        1.0,
        0,
        4,
        4.0,
        True,
    ).args[0]


@pytest.fixture
def calibration(calibrated, tmp_path):
    """The same statistics with nothing measured beside them."""
    (tmp_path / "c").symlink_to(calibrated.path)
    return type(calibrated)(tmp_path / "c")


@pytest.fixture
def allocate(full, calibration, monkeypatch):
    """The node with a menu that fits in a second: (model, report, plot)."""
    from comfyui_nibble.nodes.allocate import NibbleAllocateBits

    entries = (*(Entry(f"A{b}", "robuq", (("activation_bits", b), *FAST)) for b in (2, 4)), Entry("16 bit"))
    monkeypatch.setitem(menu.MENUS, "robuq", entries)

    def run(budget="A3", use_gains=False, **options):
        found = NibbleAllocateBits.execute(**({"model": full, "calibration": calibration} | options),
        budget=budget, menu="robuq", use_gains=use_gains, rank=0, gptq=False)  # fmt: skip
        return SimpleNamespace(**dict(zip(("model", "report", "plot"), found.args, strict=True)))

    return run


def taken(model):
    """{layer: activation bits}, 16 where it is not packed, without the modulation."""
    from comfyui_nibble.nodes.host.build import ATTACHMENT

    info = model.attachments[ATTACHMENT]
    return {
        r["name"]: 16 if r["what"] == "16 bit" else int(r["what"].split()[0].partition("A")[2])
        for r in info["report"]
        if r["block"] and "mod" not in r["name"]
    }


def weights(full):
    return {
        k.removesuffix(".weight"): t.numel()
        for k, t in full.model.diffusion_model.state_dict().items()
        if k.endswith(".weight")
    }


def test_budget_is_met_and_the_model_samples(allocate, full, calibration, monkeypatch):
    from comfyui_nibble.nodes.host import allocating

    got = allocate("A3", use_gains=True)
    bits, size = taken(got.model), weights(full)
    assert len(bits) == LAYERS
    mean = sum(b * size[n] for n, b in bits.items()) / sum(size[n] for n in bits)
    assert 2.97 <= mean <= 3.0001
    assert set(bits.values()) >= {2, 4}
    assert got.report.startswith("FLUX.1, Nibble Allocate Bits, menu robuq\n")
    assert "Asked for: 3 activation bits on average; reached: " in got.report
    said = " ".join(got.report.split())  # without its line breaks
    assert "weighted by gains measured on 2 recorded samplings of 5 steps" in said
    assert got.plot.shape[0] == 1
    assert got.plot.shape[3] == 3
    assert got.plot.dtype == torch.float32
    assert 0 <= got.plot.min() < 0.5 < got.plot.max() <= 1
    assert min(got.plot.shape[1:3]) > 400
    error = relative_error(forward(full), forward(got.model))
    assert 0.005 < error < 0.6  # 0.41: two bits and no low rank in most layers, on random text
    gains = json.loads(calibration.path.with_name("c.gains.json").read_text())["layers"]
    assert {g["name"] for g in gains} == set(bits)
    # Another budget: nothing is measured again, and what is better on the layers is better on the model.
    monkeypatch.setattr(sensitivity, "_measured", None)
    monkeypatch.setattr(allocating.comfy.model_management, "load_models_gpu", None)
    better = allocate("2x", use_gains=True)
    monkeypatch.undo()
    assert set(taken(better.model).values()) == {16}
    assert relative_error(forward(full), forward(better.model)) < 0.5 * error


def test_gains_move_the_bits(allocate, monkeypatch):
    from comfyui_nibble.nodes.host import allocating

    without = taken(allocate("A3").model)
    worst = min(without, key=without.get)
    assert without[worst] == 2
    monkeypatch.setattr(
        allocating,
        "of_calibration",
        lambda calibration, names, *_: {n: 1e6 if n == worst else 1e-6 for n in names},
    )
    assert taken(allocate("A3", use_gains=True).model)[worst] > 2


def test_memory_budget_is_the_file(allocate, tmp_path):
    import folder_paths

    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.quant_core.formats import stop

    folder_paths.set_output_directory(str(tmp_path))
    got = allocate("5 MB")
    path = NibbleSaveModel.execute(got.model, "q").args[0]
    size = sum(t.nbytes for k, t in load_file(path).items() if not k.startswith(stop.PREFIX))
    assert 4.8e6 <= size <= 5e6  # 4.86: twelve layers, and 2 or 16 bits of weight
    assert "5 MB" in got.report
    from comfyui_nibble.quant_core.formats.nibble import PackFile

    assert PackFile(path).provenance["allocation"] == {
        "budget": "5 MB",
        "reached": f"{size / 1e6:.4g} MB",
        "gains": False,
    }


def test_interrupted_run_goes_on(comfy, allocate, calibration, monkeypatch):
    seen, real = [], sensitivity._measured

    def counting(layer, *args):
        seen.append(layer.name)
        if len(seen) == 3:
            comfy.model_management.interrupt_current_processing()
        return real(layer, *args)

    monkeypatch.setattr(sensitivity, "_measured", counting)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        allocate("A3")
    assert len(seen) == 3
    (table,) = calibration.path.parent.glob("c.*.sensitivity.json")
    assert [r["name"] for r in json.loads(table.read_text())["layers"]] == seen
    allocate("A3")
    assert len(seen) == len(set(seen)) == LAYERS + 4


def test_without_matplotlib_nothing_is_lost(allocate, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    got = allocate("A4")
    assert taken(got.model)
    assert got.plot.shape[2] == 960
    assert got.plot.mean() < 0.3  # words on the dark ground, no white square
    assert "No chart: it needs matplotlib, which is not installed." in got.report


def test_refusals(comfy, allocate, full, calibrated, calibration, monkeypatch):
    with pytest.raises(BudgetError, match="budget 'lots': expected an average of bits"):
        allocate("lots")
    with pytest.raises(
        BudgetError,
        match="of the 12 layers meets 1 activation bits.*closest that can be met: 2 activation bits on "
        "average and 2",
    ):
        allocate("A1")
    lora = full.clone()
    lora.add_patches({"diffusion_model.img_in.weight": ("diff", (torch.ones(256, 64),))})
    with pytest.raises(CalibrationError, match="was made with model"):
        allocate("A3", model=lora)
    with pytest.raises(RuntimeError, match="quantized already"):
        allocate("A3", model=allocate("A4").model)
    monkeypatch.setattr(calibration, "trajectory", lambda: None)
    with pytest.raises(
        CalibrationError, match="holds no recorded inputs .* Calibrate again, or allocate without gains"
    ):
        allocate("A3", use_gains=True)
