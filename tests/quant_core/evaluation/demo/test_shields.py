"""The coats of arms of the small PixArt: drawn, captioned, coded, and what the shipped model makes of
them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from comfyui_nibble.quant_core.evaluation.demo import metrics, shields
from comfyui_nibble.quant_core.evaluation.demo.pixart_model import log_sigmas, predict, sigma_at
from comfyui_nibble.quant_core.evaluation.demo.shield_pixart import MODEL
from comfyui_nibble.tests.assets.train_shield_pixart import TOKENS, noise_of, start, tokens_of
from comfyui_nibble.tests.support import relative_error

SCENES = (
    shields.Scene("gold", "heart", "blue", "white", "fess", "bricks", "crown", "swords"),
    shields.Scene("black", "tower", "red", "gold", "pale", "velvet", "bare", "alone"),
)


def drawn(*scenes):
    return torch.stack([torch.from_numpy(shields.draw(s)) for s in scenes])


@pytest.mark.quick
def test_a_picture_has_what_its_caption_says():
    first, second = drawn(*SCENES)
    at = lambda picture, x, y: picture[round(y * 68), round(x * 68)]
    near = lambda found, name: torch.allclose(found, torch.tensor(shields.TINCTURES[name]), atol=0.08)
    for picture, x, y, name in (
        *((first, 0.5, 0.5, "gold"), (first, 0.5, 0.75, "blue"), (first, 0.25, 0.47, "white")),
        *((second, 0.44, 0.40, "black"), (second, 0.5, 0.75, "gold"), (second, 0.3, 0.6, "red")),
        *((first, 0.5, 0.1, "gold"), (first, 0.06, 0.94, "gold")),  # crown and pommel
    ):
        assert near(at(picture, x, y), name), (x, y, name, at(picture, x, y))
    assert not near(at(second, 0.5, 0.1), "gold")
    assert not near(at(second, 0.06, 0.94), "gold")


@pytest.mark.quick
def test_only_the_light_on_the_wall_is_left_to_the_seed():
    left, right = drawn(*(replace(SCENES[1], light=light) for light in (-1.0, 1.0)))
    changed = (left - right).abs().amax(-1) > 1e-3
    assert not changed[20:50, 17:51].any()
    assert changed[:8, :20].float().mean() > 0.9
    assert left[:8, :20].mean() > right[:8, :20].mean() + 0.1


@pytest.mark.quick
def test_captions_are_trained_on_or_held_out():
    assert SCENES[0].caption == "gold heart on blue field, white fess, bricks, crown, swords"
    rng = np.random.default_rng(0)
    for held in (True, False):
        scenes = [shields.scene_of(rng, held) for _ in range(100)]
        assert {shields.held_out(s.caption) for s in scenes} == {held}
        assert all(len({s.color, s.field, s.second}) == 3 for s in scenes)
    assert all(shields.held_out(caption) for caption in MODEL.judged)
    assert len(set(MODEL.judged)) == 32


@pytest.mark.quick
def test_codec_keeps_the_pictures():
    pictures = drawn(*SCENES)
    latents = shields.encode(pictures)
    assert latents.shape == (2, 4, 34, 34)
    assert metrics.psnr_db(pictures, shields.decode(latents), 1.0) > 24
    # What the latent has no room for is lost once.
    again = shields.encode(shields.decode(latents))
    assert metrics.psnr_db(shields.decode(latents), shields.decode(again), 1.0) > 33
    assert 0.5 < latents.std() < 1.5


@pytest.mark.quick
def test_text_encoding():
    context = shields.encode_caption(SCENES[0].caption)
    assert context.shape == (12, 128)
    assert torch.equal(context, shields.encode_caption(SCENES[0].caption.replace(",", "")))
    other = shields.encode_caption(replace(SCENES[0], ordinary="bend").caption)
    assert (context != other).any(1).nonzero().flatten().tolist() == [4]
    assert shields.encode_caption("").abs().sum() == 0


@pytest.mark.quick
def test_the_vocabulary_is_all_that_a_text_can_hold():
    words, filled = shields.vocabulary()
    assert (len(words), int(filled.sum())) == (1 + 4 * 7 + 7 + 3 + 2 + 3 + 4, 4)
    rng = np.random.default_rng(1)
    captions = [shields.random_scene(rng).caption for _ in range(50)] + [""]
    for row in torch.cat([shields.encode_caption(c) for c in captions]):
        assert (words == row).all(1).any()
    assert torch.equal(
        words[filled].unique(dim=0), shields.encode_caption(SCENES[0].caption)[8:].unique(dim=0)
    )


@pytest.mark.quick
def test_sigmas_are_those_of_the_schedule():
    kept = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    for t in (0, 500, 999):
        assert sigma_at(torch.tensor([float(t)])) == pytest.approx(np.sqrt(1 / kept[t] - 1), rel=1e-4)
    half = sigma_at(torch.tensor([500.5]))
    assert half.log() == pytest.approx(float(log_sigmas()[500:502].mean()), rel=1e-5)


def test_the_training_sees_what_the_model_predicts():
    torch.manual_seed(0)
    model = MODEL.build().eval()
    latents, context = torch.randn(2, 4, 34, 34), torch.randn(2, 12, 128)
    timestep, seen = torch.tensor([10.0, 700.5]), torch.arange(TOKENS)
    with torch.no_grad():
        want = tokens_of(predict(model, latents, timestep, context))
        assert relative_error(want, noise_of(model, latents, timestep, context, seen)) < 1e-6
        start(model)
        got = noise_of(model, latents, timestep, context, seen)
    assert relative_error(tokens_of(latents), got) < 0.1  # all that it sees is noise to it


def test_shipped_model_is_small_and_draws_its_captions():
    """Captions that it was never trained on: nearly the picture of the formula under one of five lights, and
    another caption's picture under none."""
    assert MODEL.checkpoint.stat().st_size <= 6_000_000
    rng = np.random.default_rng(3)
    scenes = [shields.random_scene(rng) for _ in range(6)]
    got = shields.decode(MODEL.sample(MODEL.load(), [s.caption for s in scenes], steps=20, seed=1))
    lights = (-1.0, -0.5, 0.0, 0.5, 1.0)
    want = torch.stack([drawn(*(replace(s, light=light) for light in lights)) for s in scenes])
    want = shields.decode(shields.encode(want.flatten(0, 1))).unflatten(0, (-1, len(lights)))
    found = torch.tensor([[max(metrics.psnr_db(w, g, 1.0) for w in of) for of in want] for g in got])
    assert found.diagonal().min() > 25
    assert found.diagonal().mean() > 28
    others = found.masked_fill(torch.eye(len(scenes), dtype=torch.bool), 0.0)
    assert (found.diagonal() > others.amax(1) + 8).all()
    assert 0.8 < metrics.high_frequency_ratio(want[:, 2], got) < 1.2
