"""The comparison of grids: which rows there are, and that more rank has as many bits as nvfp4."""

import pytest
from typer.testing import CliRunner

from comfyui_nibble.kernels.operator.codes import INT, NVFP4
from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.ablate import plot, table
from comfyui_nibble.quant_core.evaluation.ablate import run as ablation
from comfyui_nibble.quant_core.evaluation.ablate.grids import AGAINST, entries


def bits(problem, entry) -> float:
    layer = entry.method.fit(problem, entry.method.config).layer
    assert {part.grid for part in layer.spec.parts} == {entry.method.config.grid}
    return 8 * layer.nbytes / problem.weight.numel()


def test_rows():
    found = {entry.name: entry.method for entry in entries()}
    assert len(found) == len(entries()) == 8
    assert [m.config.grid for m in found.values()].count(NVFP4) == 3
    assert set(AGAINST) <= set(found)
    assert all(found[name].config.grid == INT for name in AGAINST)


def test_more_rank_has_the_bits_of_nvfp4(make_problem):
    """Not fewer: scales of 8 bit each 16 channels for those of 16 bit each 64, and one of 32 bit a row."""
    problem, rows = make_problem(256, 256), {entry.name: entry for entry in entries()}
    plain, nvfp4, more = (
        bits(problem, rows[name]) for name in ("svdquant", "svdquant, nvfp4", "svdquant, rank 36")
    )
    assert nvfp4 - plain == pytest.approx(0.375, abs=0.01)
    assert more - plain == pytest.approx(0.5, abs=0.01)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "run", lambda out, rows, *args, **options: rows)
    monkeypatch.setattr(
        table, "ablation_text", lambda rows, against: f"{len(rows)} rows against {against[0]}"
    )
    monkeypatch.setattr(plot, "plot", lambda path, rows, base: None)
    result = CliRunner().invoke(app, ["ablate", "grids", "--out", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (0, "8 rows against svdquant\n")
