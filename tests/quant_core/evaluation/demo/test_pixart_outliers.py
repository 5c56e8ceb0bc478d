"""Outliers of the small PixArt: another kind than FLUX's, the same function."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from comfyui_nibble.quant_core.evaluation.demo import metrics, run, shields
from comfyui_nibble.quant_core.evaluation.demo.pixart_model import predict
from comfyui_nibble.quant_core.evaluation.demo.pixart_outliers import add_outliers, channel_factors
from comfyui_nibble.quant_core.evaluation.demo.shield_pixart import MODEL
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.support import relative_error


@pytest.fixture(scope="module")
def state():
    return load_file(MODEL.checkpoint)


def inputs():
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 34, 34, generator=g)
    return latents, torch.tensor([950.0, 400.5, 20.0]), MODEL.encode_captions([*shields.CAPTIONS[:2], ""])


@pytest.mark.parametrize("severity", [0.0, 0.4, 1.0])
def test_outliers_preserve_the_function(state, severity):
    with torch.no_grad():
        want = predict(MODEL.load(state), *inputs())
        got = predict(MODEL.load(MODEL.with_outliers(state, severity)), *inputs())
    assert relative_error(want, got) < 1e-5


def watched(state, names):
    """{module: its input} of one call."""
    model, seen = MODEL.load(state), {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        predict(model, *inputs())
    return seen


def test_where_the_outliers_are(state):
    block = "transformer_blocks.2"
    names = [f"{block}.{n}" for n in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_out.0")]
    names.append(f"{block}.ff.net.0.proj")
    before, after = (watched(s, names) for s in (state, MODEL.with_outliers(state, 1.0)))
    peak = lambda x: float(x.abs().flatten(0, 1).amax(0).max() / x.abs().flatten(0, 1).amax(0).median())
    for name in names:
        assert peak(after[name]) > 2.5 * peak(before[name]), name
    text = after[f"{block}.attn2.to_k"][0].abs().amax(1)
    assert text[8:].min() > max(4 * text[:8].max(), 10 * text[:8].median())


def test_a_scale_for_a_whole_tensor_breaks_and_svdquant_does_not(state, tmp_path):
    """Four captions, eight steps; the rank is 4 of 192 channels, near FLUX's 32 of 3072."""
    hard = MODEL.with_outliers(state, 1.0)
    model = MODEL.load(hard)
    layers = MODEL.family.layers({k: tuple(v.shape) for k, v in hard.items()})
    calibration = run.calibrate_tiny(model, layers, tmp_path, steps=5, samples=4, small=MODEL)
    captions = MODEL.judged[-4:]
    want = shields.decode(MODEL.sample(model, captions, steps=8, seed=7))
    svdquant = METHODS["svdquant_r"]
    image = {}
    for method in (run.NAIVE, METHODS["rtn"], replace(svdquant, config=replace(svdquant.config, rank=4))):
        made, rows = run.quantized_copy(model, layers, hard, method, calibration, MODEL)
        assert len(rows) == 29
        got = shields.decode(MODEL.sample(made, captions, steps=8, seed=7))
        image[method.name] = metrics.psnr_db(want, got, 1.0)
    assert image["naive"] < 12
    assert image["svdquant_r"] > image["rtn"] + 6


@pytest.mark.quick
def test_severity_is_a_dial_and_the_tail_is_heavy():
    assert torch.equal(channel_factors(192, 0.0, 1), torch.ones(192))
    mild, hard = channel_factors(192, 0.4, 1), channel_factors(192, 1.0, 1)
    assert torch.allclose(mild, hard**0.4)
    many = channel_factors(100_000, 1.0, 1)
    assert 2.2 < many.median() < 2.6
    assert 0.018 < (many > 20).float().mean() < 0.032
    # Student's tail: 4 times as far out on the scale of t, a sixteenth as often.
    t = many ** (1 / 1.5) - 1
    assert 12 < (t > 5).sum() / (t > 20).sum() < 20


@pytest.mark.quick
def test_words_that_take_all_directions_are_refused():
    torch.manual_seed(0)
    state = MODEL.from_diffusers(MODEL.build().state_dict())
    words = torch.randn(300, 128)
    with pytest.raises(ValueError, match="300 words leave none of 192 directions of the text free"):
        add_outliers(state, 1.0, words, torch.zeros(300, dtype=torch.bool))
