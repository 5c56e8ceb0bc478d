import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.calibration.file import merge
from comfyui_nibble.quant_core.cli import quantize as job
from comfyui_nibble.quant_core.evaluation.demo import run, tiny_flux
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.precision import menu
from comfyui_nibble.quant_core.precision.budget import BudgetError
from comfyui_nibble.quant_core.run import stages
from comfyui_nibble.quant_core.training import presets
from comfyui_nibble.quant_core.training.reconstruct import TrainConfig
from comfyui_nibble.quant_core.training.trainer import NoTrajectory
from comfyui_nibble.tests.support import nibble


def test_quantize_then_inspect(tmp_path, calibration):
    out = tmp_path / "q.safetensors"
    text = nibble(
        "quantize",
        tiny_flux.CHECKPOINT,
        out,
        "--method",
        "svdquant",
        "--calibration",
        calibration,
        "--no-gptq",
        "--rank",
        16,
        "--device",
        "cpu",
    )
    assert "16 layers" in text
    assert "worst" in text
    found = json.loads(nibble("inspect", out, "--json"))
    assert found["kind"] == "Nibble model"
    assert found["quantized layers"] == 16
    assert found["provenance"]["settings"]["rank"] == 16
    assert found["provenance"]["source"]["file"] == "tiny_flux.safetensors"
    assert len(found["provenance"]["source"]["sha256"]) == 64
    assert found["runs on this machine"][0].startswith("Runs on ")
    # 12 and 4 in int8, where this processor has it, 16 in plain PyTorch.
    assert re.match(r"  1[26] layers: ", found["runs on this machine"][1])
    assert "W4A4 g64 smooth r16" in found["layers"]["double_blocks.0.img_attn.qkv"]
    assert not (tmp_path / "q.safetensors.partial").exists()
    assert json.loads(nibble("inspect", calibration, "--json"))["kind"] == "calibration"
    assert "FLUX.1" in nibble("inspect", tiny_flux.CHECKPOINT)


def test_merging_calibrations(tmp_path, calibration):
    said = nibble("merge-calibrations", tmp_path / "m", calibration, calibration)
    assert "8 samples" in said
    name = Calibration(calibration).names[0]
    assert Calibration(tmp_path / "m").get(name).count == 2 * Calibration(calibration).get(name).count
    with pytest.raises(ValueError, match="expected two or more to merge"):
        nibble("merge-calibrations", tmp_path / "n", calibration)


def test_other_options_of_a_method(tmp_path):
    out = tmp_path / "q.safetensors"
    nibble(
        "quantize",
        tiny_flux.CHECKPOINT,
        out,
        "--method",
        "splitquant",
        "--set",
        "slices=1",
        "--set",
        "transform=hadamard",
        "--set",
        "sort=true",
    )
    settings = PackFile(out).provenance["settings"]
    assert (settings["slices"], settings["transform"], settings["sort"]) == (1, "hadamard", True)


@pytest.mark.parametrize(
    ("pair", "message"),
    [("slices", "expected name=value"), ("slice=4", "no option"), ("scales=row", "scales must be one of")],
)
def test_options_that_are_none(tmp_path, pair, message):
    with pytest.raises(ValueError, match=message):
        nibble(
            "quantize",
            tiny_flux.CHECKPOINT,
            tmp_path / "q.safetensors",
            "--method",
            "splitquant",
            "--set",
            pair,
        )


def test_robuq(tmp_path, calibration):
    out = tmp_path / "q.safetensors"
    text = nibble(
        "quantize",
        tiny_flux.CHECKPOINT,
        out,
        "--method",
        "robuq",
        "--calibration",
        calibration,
        "--rank",
        0,
        "--device",
        "cpu",
    )
    assert "RobuQ (ternary weights)" in text
    assert "W2A4 per channel smooth H256" in text
    assert PackFile(out).specs["single_blocks.0.linear2"].parts[1].weight.bits == 2


def test_allocate(tmp_path, calibration, monkeypatch):
    fast = (("smooth", ((0.5, 0.5),)), ("iterations", 0), ("finalists", 1))
    entries = tuple(menu.Entry(f"A{b}", "robuq", (("activation_bits", b), *fast)) for b in (2, 3, 8))
    monkeypatch.setitem(menu.MENUS, "robuq", entries)
    out, gains = tmp_path / "q.safetensors", tmp_path / "gains.json"
    gains.write_text('{"single_blocks.1.linear1": 1000}')
    args = (
        "allocate",
        tiny_flux.CHECKPOINT,
        out,
        "--calibration",
        calibration,
        "--rank",
        0,
        "--no-gptq",
        "--device",
        "cpu",
    )
    text = nibble(*args, "--budget", "A3", "--gains", gains)
    assert "q.safetensors\nAsked for: 3 activation bits on average; reached: " in text
    assert "16 layers: " in text
    specs = PackFile(out).specs
    assert {p.activation.bits for p in specs["single_blocks.1.linear1"].parts} == {8}
    assert {p.activation.bits for s in specs.values() if not s.weight_only for p in s.parts} >= {2, 8}
    assert (tmp_path / "q.safetensors.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "q.safetensors.sensitivity.json").read_text())["layers"]) == 16
    with pytest.raises(
        BudgetError,
        match="no assignment of the 12 layers meets 9 activation bits on average. The closest that can be "
        "met: ",
    ):
        nibble(*args, "--budget", "A9")


def test_killed_run_goes_on_behind_its_last_layer(tmp_path, monkeypatch):
    out, seen, said, real = tmp_path / "q.safetensors", [], [], stages.quantize_layers

    def dies_at_the_fifth_layer(members, *args):
        seen.extend(layer.name for layer in members)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(members, *args)

    monkeypatch.setattr(stages, "quantize_layers", dies_at_the_fifth_layer)
    from comfyui_nibble.quant_core.methods import METHODS

    rtn = METHODS["rtn"]
    with pytest.raises(KeyboardInterrupt):
        job.quantize_file(tiny_flux.CHECKPOINT, out, rtn, rtn.config, say=said.append)
    assert not out.exists()
    assert not said
    job.quantize_file(tiny_flux.CHECKPOINT, out, rtn, rtn.config, say=said.append)
    [line] = said
    assert line.startswith(f"{out}.partial: 4 finished pieces of the run since ")
    assert len(seen) == 17
    assert [name for name in seen if seen.count(name) > 1] == [seen[4]] * 2  # 16 layers, one of them twice
    monkeypatch.setattr(stages, "quantize_layers", real)
    whole = tmp_path / "whole.safetensors"
    job.quantize_file(tiny_flux.CHECKPOINT, whole, rtn, rtn.config)
    a, b = load_file(out), load_file(whole)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_diffusers_folder_gives_the_same_model(tmp_path, tiny_state):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in tiny_flux.to_diffusers(tiny_state).items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    for source, name in ((folder, "a"), (tiny_flux.CHECKPOINT, "b")):
        nibble("quantize", source, tmp_path / f"{name}.safetensors", "--method", "convrot", "--device", "cpu")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """The shipped model as a diffusers `transformer` folder."""
    folder = tmp_path_factory.mktemp("model") / "transformer"
    tiny_flux.load().save_pretrained(folder)
    return folder


def test_training(tmp_path, transformer, monkeypatch):
    """The standard preset with a few steps: a stopped run goes on, the file says what was trained."""
    few = TrainConfig(("transform", "smooth"), steps=4, calls=2)
    monkeypatch.setitem(presets.PRESETS["splitquant"], "standard", presets.Preset(few, None))
    checkpoint = Checkpoint(transformer)
    layers = FLUX.layers(checkpoint.shapes)
    made = run.calibrate_tiny(
        tiny_flux.load(), layers, tmp_path / "c", steps=3, samples=3, model_hash=checkpoint.fingerprint()
    )
    out = tmp_path / "q.safetensors"
    args = [
        "quantize",
        transformer,
        out,
        "--method",
        "splitquant",
        "--calibration",
        made.path,
        "--device",
        "cpu",
        "--no-gptq",
    ]
    text = nibble(*args, "--training", "standard")
    pack = PackFile(out)
    assert pack.provenance["settings"]["gptq"] is False
    assert pack.provenance["training"]["blocks"]["steps"] == 4
    told = [row["choices"].get("training") for row in pack.report]
    assert sum(t is not None for t in told) == 12
    assert all(t is None or t.startswith(("trained +", "kept its start")) for t in told)
    assert text.count("training trained") + text.count("training kept its start") == 12
    assert str(tmp_path / "q.safetensors.losses.png") in text
    assert (tmp_path / "q.safetensors.losses.png").stat().st_size > 10_000
    losses = json.loads((tmp_path / "q.safetensors.losses.json").read_text())
    assert list(losses) == ["double_blocks.0", "single_blocks.0", "single_blocks.1"]
    assert not (tmp_path / "q.safetensors.partial").exists()


def test_training_without_recorded_calls(tmp_path, transformer):
    checkpoint = Checkpoint(transformer)
    layers = FLUX.layers(checkpoint.shapes)
    made = run.calibrate_tiny(
        tiny_flux.load(), layers, tmp_path / "c", steps=1, samples=1, model_hash=checkpoint.fingerprint()
    )
    merge([made.path, made.path], tmp_path / "merged")
    args = [
        "quantize",
        transformer,
        tmp_path / "q",
        "--method",
        "splitquant",
        "--training",
        "standard",
        "--device",
        "cpu",
    ]
    with pytest.raises(NoTrajectory, match="merged: holds no recorded inputs of the network to train on"):
        nibble(*args, "--calibration", tmp_path / "merged")
    with pytest.raises(NoTrajectory, match="training needs a calibration, found none"):
        nibble(*args)
    args[1] = tiny_flux.CHECKPOINT
    with pytest.raises(ValueError, match="expected a diffusers `transformer` folder"):
        nibble(*args, "--calibration", made.path)
    assert not (tmp_path / "q").exists()


@pytest.mark.quick
def test_layer_that_does_not_divide_by_64_is_filled_up(tmp_path):
    from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state

    state, key = (
        random_state(flux_shapes(hidden=128, context=64, pooled=64)),
        "double_blocks.0.img_attn.qkv.weight",
    )
    state[key] = torch.randn(state[key].shape[0], 100).bfloat16()
    save_file(state, tmp_path / "odd.safetensors")
    nibble(
        "quantize",
        tmp_path / "odd.safetensors",
        tmp_path / "q.safetensors",
        "--method",
        "rtn",
        "--device",
        "cpu",
    )
    pack = PackFile(tmp_path / "q.safetensors")
    spec = pack.specs[key.removesuffix(".weight")]
    assert (spec.in_features, spec.padding) == (100, 28)
    assert pack.logical_shapes()[key] == (384, 100)
