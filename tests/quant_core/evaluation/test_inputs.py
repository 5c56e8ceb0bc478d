"""Kinds of inputs have what they are named for, and are the same for the same seed."""

import pytest
import torch

from comfyui_nibble.quant_core.evaluation import bench_fit, inputs
from comfyui_nibble.quant_core.methods import METHODS


def of(kind, count=2048, width=256, seed=1):
    return inputs.KINDS[kind][0](count, width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_seeded(kind):
    assert torch.equal(of(kind), of(kind))
    assert not torch.equal(of(kind), of(kind, seed=2))
    assert of(kind).shape == (2048, 256)
    assert of(kind).isfinite().all()


def test_what_they_are_named_for():
    kurtosis = lambda x: float((x - x.mean(0)).pow(4).mean() / (x - x.mean(0)).square().mean().square())
    assert kurtosis(of("heavy tails")) > 15  # 3 of a Gaussian; its channels' sizes alone make 7
    largest = of("massive tokens").abs().amax(1)
    assert 3 < int((largest > 200).sum()) < 25  # 1 in 200
    norms = of("token norms").norm(dim=1)
    assert norms.max() / norms.min() > 50
    means = of("adaLN shift").mean(0).abs()
    assert means.sort().values[-16:].min() > 1
    assert -0.171 < float(of("GELU").min()) < -0.169
    values = torch.linalg.svdvals(of("falling spectrum") / (0.6 * inputs._randn(256, seed=3)).exp())
    assert float(values[0] / values[99]) == pytest.approx(100**0.7, rel=0.25)


def test_a_layer_of_a_kind(monkeypatch):
    monkeypatch.setitem(inputs.KINDS, "GELU", (inputs.after_gelu, 128, 64))
    found = [bench_fit.fit_kind("GELU", METHODS[m]) for m in ("rtn", "svdquant")]
    assert found[1]["sqnr_db"] > found[0]["sqnr_db"] + 5
    # The tokens are made once; what a fit has used up must not be missing in the next one.
    assert bench_fit.fit_kind("GELU", METHODS["svdquant"]) == found[1]
    text = bench_fit.kinds_text(found)
    assert text.splitlines()[0].split()[-2:] == ["rtn", "svdquant"]
    assert f"{found[1]['sqnr_db']:.2f}" in text.splitlines()[1]
