"""Rough errors of candidates against those of the candidates fitted in full, one by one and in a batch."""

import pytest
import torch

from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.methods import METHODS, ranking, svdquant
from comfyui_nibble.quant_core.methods.robuq import RobuQPart
from comfyui_nibble.quant_core.methods.svdquant import PartFit


def part_fit(problem, method="svdquant_r", **options):
    config = METHODS[method].configured(**options)
    kind = RobuQPart if method == "robuq" else PartFit
    return kind(problem, problem.layer.parts[0], config)


@pytest.mark.parametrize("method", ["svdquant_r", "robuq"])
@pytest.mark.parametrize("gelu", [False, True])
def test_errors_are_those_of_the_candidates(make_problem, monkeypatch, method, gelu):
    """With as many steps of the low rank as a fit takes; the branch is not rounded to 16 bit here."""
    real = ranking.truncated_chunks
    monkeypatch.setattr(ranking, "truncated_chunks", lambda chunks, rank, iterations: real(chunks, rank))
    fit = part_fit(make_problem(96, 512, (Part(0, 512, gelu),)), method, rank=16)
    for spec, _, smooth in list(fit._candidates())[::5]:
        rough = ranking.rough_errors(fit, spec, smooth[None], fit.weight.float(), fit.y)
        exact = fit._rounded(spec, smooth, "plain", None, {}).error
        assert float(rough) == pytest.approx(exact, rel=0.02)


def test_a_batch_is_ranked_as_one_by_one(make_problem, monkeypatch):
    fit = part_fit(make_problem(96, 512), rank=16)
    one_by_one = fit._ranked(list(fit._candidates()))
    monkeypatch.setattr(svdquant, "at_a_time", lambda weight: 4)
    batched = fit._ranked(list(fit._candidates()))
    assert [c[1] for c in batched] == [c[1] for c in one_by_one]


def test_how_many_make_a_batch():
    assert ranking.at_a_time(torch.zeros(512, 3072)) == 1
    assert ranking.at_a_time(torch.zeros(512, 3072, device="meta")) == 21
