"""The method native: the cheapest of stock ComfyUI's formats that is good enough."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.formats.kitchen import native as exported
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.layer.problem import Problem, output_sqnr
from comfyui_nibble.quant_core.methods import METHODS, fit_problem, native
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.support import nibble, sqnr_db

METHOD = METHODS["native"]


def fit(problem, **options):
    return fit_problem(problem, METHOD, METHOD.configured(**options))


def smooth_problem(make_problem, seed=0, **kwargs):
    """Without outliers: correlated tokens and Gaussian weights."""
    problem = make_problem(192, 512, calibrated=False, seed=seed, **kwargs)
    problem.weight = (
        torch.randn(192, 512, generator=torch.Generator().manual_seed(seed)) / 512**0.5
    ).bfloat16()
    return problem


@pytest.mark.parametrize(
    ("quality", "what"),
    [(3, "W4A4 per channel H256"), (12, "W8A8 per channel H256"), (24, "W8A8 per channel H256"), (60, None)],
)
def test_the_cheapest_that_is_good_enough(make_problem, quality, what):
    """Under the outliers of these tokens 4 bits reach 4.7 dB and 8 bits 25.6."""
    fitted = fit(make_problem(192, 512), quality_db=quality)
    if what is None:
        assert fitted.layer is None
        assert fitted.choices["at 8 bits"].endswith("dB, below 60")
        return
    assert fitted.layer.spec.describe() == what
    assert exported.format_of(fitted.layer.spec)[1] == ""
    assert output_sqnr(make_problem(192, 512), fitted.layer, "select") >= quality


def test_gptq_in_the_rotated_space_is_kept_where_it_is_better(make_problem):
    plain, full = (
        fit(p := make_problem(192, 512), quality_db=0, gptq=False),
        fit(q := make_problem(192, 512), quality_db=0),
    )
    assert full.choices == {"rounding": "gptq, clipped"}
    assert plain.choices["rounding"].startswith("nearest")
    assert output_sqnr(q, full.layer) > output_sqnr(p, plain.layer) + 0.8
    # Independent tokens leave nothing to win; the select tokens say so.
    problem = make_problem(192, 512)
    for block in problem.statistics.hessians:
        problem.statistics.hessians[block] = torch.diag(
            torch.logspace(-6, 6, block[1] - block[0])
        )  # of some other model
    assert fit(problem, quality_db=0).choices["rounding"].startswith("nearest")


def test_second_moments_are_left_as_they_were(make_problem):
    problem = make_problem(96, 256)
    before = {b: h.clone() for b, h in problem.statistics.hessians.items()}
    fit(problem, quality_db=0)
    assert all(torch.equal(before[b], h) for b, h in problem.statistics.hessians.items())


def test_rotation_fits_the_blocks_of_second_moments(make_problem):
    """Parts of 320 and 704 channels: 64 divides both, 256 neither."""
    problem = make_problem(96, 1024, (Part(0, 320), Part(320, 1024, after_gelu=True)))
    layer = fit(problem, quality_db=0).layer
    assert len(layer.spec.parts) == 1
    assert layer.spec.parts[0].rotation == 64


def test_without_calibration_the_weights_decide(make_problem):
    """Clipped 4-bit rows of 512 Gaussians have 19 dB; x counts for as much again."""
    problem = smooth_problem(make_problem)
    four = fit(problem, quality_db=15).layer
    assert four.spec.describe() == "W4A4 per channel H256"
    weights = sqnr_db(problem.weight.float(), four.dequantize())
    assert 18 < weights < 20
    assert fit(problem, quality_db=weights - native.BOTH_SIDES - 0.1).layer.spec.parts[0].weight.bits == 4
    assert fit(problem, quality_db=weights - native.BOTH_SIDES + 0.1).layer.spec.parts[0].weight.bits == 8
    assert fit(problem, quality_db=50).layer is None


def test_modulation_has_8_or_16_bits(make_problem):
    problem = make_problem(192, 512)
    layer = Layer("a", "blocks.0", 512, 192, problem.layer.parts, "a", weight_only=True)
    only = Problem(layer, problem.weight, problem.bias, problem.statistics)
    assert fit(only, quality_db=0).layer.spec.describe() == "W8A8 per channel H256"
    assert fit(only, quality_db=60).layer is None


def test_layers_whose_width_comfyui_reads_are_not_packed(make_problem):
    problem = make_problem(64, 256)
    problem.layer = replace(problem.layer, name="input_blocks.4.1.transformer_blocks.0.attn2.to_k")
    assert fit(problem, quality_db=0).layer.spec.parts[0].weight.bits == 8


def test_from_the_command_line(tmp_path):
    out = tmp_path / "q.safetensors"
    nibble(
        "quantize",
        tiny_flux.CHECKPOINT,
        out,
        "--method",
        "native",
        "--set",
        "quality_db=16",
        "--device",
        "cpu",
    )
    opened = PackFile(out)
    assert exported.losses(opened.specs) == {}
    assert {s.parts[0].weight.bits for s in opened.specs.values()} == {4, 8}
    assert (opened.provenance["method"], opened.provenance["settings"]["quality_db"]) == ("native", 16)


def test_a_report_says_why_a_layer_stays(make_problem):
    problem = make_problem(64, 256, calibrated=False)
    tensors = {f"{problem.layer.name}.weight": problem.weight}
    [(layer, row)] = quantize_layers(
        [problem.layer], Tensors(tensors), METHOD, METHOD.configured(quality_db=60)
    )
    assert layer is None
    assert row.what == "16 bit"
    assert row.note.startswith("at 8 bits 40.4 dB")
    assert row.note.endswith(", below 60")
