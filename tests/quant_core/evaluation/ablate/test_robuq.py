from itertools import pairwise

import torch
from typer.testing import CliRunner

from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.quantizers import quantize, ternary_scale
from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.ablate import plot, table
from comfyui_nibble.quant_core.evaluation.ablate import run as ablation
from comfyui_nibble.quant_core.evaluation.ablate.robuq import BASE, STEPS, entries, stepped
from comfyui_nibble.quant_core.evaluation.ablate.splitquant import cost_at
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.methods.robuq import RobuQConfig
from comfyui_nibble.quant_core.store.workers import HERE
from comfyui_nibble.quant_core.training.presets import PRESETS, UNTRAINED


def test_first_row_is_the_weight_rounded_to_nearest(make_problem):
    """Each row of the weight at its own best ternary scale, tokens at their largest magnitude, and nothing
    else."""
    problem = make_problem(64, 128)
    entry = stepped("nearest")
    layer = entry.method.fit(problem, entry.method.config).layer
    (part,) = layer.spec.parts
    assert (part.rotation, part.rank, part.activation.bits, part.activation.clip) == (0, 0, 4, 1.0)
    scale = ternary_scale(problem.weight.float()).to(problem.dtype)
    assert torch.equal(layer.tensors["weight_scale"].flatten(), scale.flatten())
    codes = quantize(problem.weight.float(), scale.float(), 2, "channel")
    assert torch.equal(unpack(layer.tensors["weight"], 2), codes)


def test_steps_add_up_to_the_method():
    for before, after in pairwise(STEPS.values()):
        assert after[: len(before)] == before
        assert len(after) > len(before)
    assert stepped("+ gptq").method.config == RobuQConfig()


def test_rows():
    found = entries()
    assert len({entry.name for entry in found}) == len(found) == 1 + 6 + 2 + 2 * len(PRESETS["robuq"])
    assert found[0].name == BASE
    assert found[: len(entries(quick=True))] == entries(quick=True)
    assert all(entry.preset == UNTRAINED for entry in entries(quick=True))
    assert [e.preset for e in found if e.name.startswith("robuq A4, trained")] == [*PRESETS["robuq"].values()]


def test_cost_of_a_low_rank_counts():
    """A rotation of 256 channels is 8 multiply-adds a channel of 3072, rank 32 twice 32."""
    costs = {entry.name: cost_at(entry.method) for entry in entries(quick=True)}
    assert costs["ternary A4, nearest"] == 0
    assert costs["ternary A4, + rotation"] == 8 / 3072
    assert costs["ternary A4, + low rank"] == costs["robuq A2"] == (8 + 64) / 3072


def test_command(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "run", lambda *args, **options: asked.append((args, options)) or [])
    monkeypatch.setattr(table, "ablation_text", lambda rows, against: f"{rows} against {against}")
    monkeypatch.setattr(plot, "plot", lambda path, rows, base: path.write_text(base))
    command = ["ablate", "robuq", "--out", str(tmp_path), "--quick", "--severity", "0.4", "--seeds", "3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    ((args, options),) = asked
    assert args[:3] == (tmp_path, entries(quick=True), 0.4)
    assert options == {"seeds": range(7, 10), "kinds": False, "small": tiny_flux.MODEL, "workers": HERE}
    told = "[] against ('ternary A4, nearest', 'svdquant_r')\n"
    assert result.stdout == (tmp_path / "ablation.txt").read_text() == told
    assert (tmp_path / "ablation.png").read_text() == "ternary A4, nearest"
