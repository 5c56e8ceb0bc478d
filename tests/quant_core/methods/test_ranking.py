"""Rough errors of candidates against those of the candidates fitted in full, one by one and in a batch."""

from collections import Counter

import pytest
import torch

from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.methods import METHODS, principal, ranking, svdquant
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
        exact = fit.rounded(spec, smooth, "plain", None, {}).error
        assert float(rough) == pytest.approx(exact, rel=0.02)


def test_errors_with_principal_components(make_problem, monkeypatch):
    """Those of `principal.best`, of the one smoothing that there is."""
    real = ranking.truncated_chunks
    monkeypatch.setattr(ranking, "truncated_chunks", lambda chunks, rank, iterations: real(chunks, rank))
    options = {"rank": 16, "principal": (0.5,), "smooth": ((0.5, 0.25),), "smooth_statistics": ("rms",)}
    fit = part_fit(make_problem(96, 512), "svdquant_p", **options)
    transforms = fit._transforms()
    [best] = principal.best(fit, transforms)
    (_, smooth), *none = fit.smooths(0.0)
    assert not none
    assert best.spec.principal == 8
    directions = principal._directions(fit, smooth, 8)
    rough = [
        float(ranking.rough_errors(fit, c.spec, smooth[None], fit.weight.float(), fit.y, directions[None]))
        for c in transforms
    ]
    assert min(rough) == pytest.approx(best.error, rel=0.02)


def test_the_weight_is_folded_once_for_each_transform(make_problem, monkeypatch):
    """Four smoothings rounded in full, two of them with components tried, two carried to GPTQ, which folds it
    transposed."""
    counts = Counter()
    for name in ("folded", "folded_t"):
        real = getattr(svdquant, name)
        monkeypatch.setattr(
            svdquant, name, lambda *a, name=name, real=real: counts.update([name]) or real(*a)
        )
    fit = part_fit(make_problem(96, 512), "svdquant_p", rank=16)
    fit.fit()
    assert counts["folded"] <= 7
    assert counts["folded_t"] == 2


def test_a_batch_is_ranked_as_one_by_one(make_problem, monkeypatch):
    fit = part_fit(make_problem(96, 512), rank=16)
    one_by_one = fit._ranked(list(fit._candidates()))
    monkeypatch.setattr(svdquant, "at_a_time", lambda weight: 4)
    batched = fit._ranked(list(fit._candidates()))
    assert [c[1] for c in batched] == [c[1] for c in one_by_one]


def test_how_many_make_a_batch():
    assert ranking.at_a_time(torch.zeros(512, 3072)) == 1
    assert ranking.at_a_time(torch.zeros(512, 3072, device="meta")) == 21
