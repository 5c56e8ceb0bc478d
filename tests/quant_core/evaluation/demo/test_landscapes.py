"""The landscapes that `nibble demo` shows: drawn, captioned, coded, and what the shipped model makes of
them."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from comfyui_nibble.quant_core.evaluation.demo import landscapes, metrics
from comfyui_nibble.quant_core.evaluation.demo.landscape_flux import MODEL
from comfyui_nibble.quant_core.evaluation.demo.model import predict
from comfyui_nibble.tests.assets.train_landscape_flux import SKY, start_with_places

SCENES = (
    landscapes.Scene("hills", "day", "left", "meadow", "one", "one"),
    landscapes.Scene("volcano", "night", "right", "lake", "no", "no"),
)


def drawn(*scenes):
    return torch.stack([torch.from_numpy(landscapes.draw(s)) for s in scenes])


def color(time, name):
    text = landscapes.PALETTES[time].split()[landscapes._NAMES.index(name)]
    return torch.tensor([int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)])


@pytest.mark.quick
def test_a_picture_has_what_its_caption_says():
    day, night = drawn(*SCENES)
    at = lambda picture, x, y: picture[int(y * 128), int(x * 128)]
    for picture, x, y, time, name in (
        (day, landscapes.PLACES["left"], landscapes.HEIGHTS["day"], "day", "sun"),
        (day, 0.38, 0.71, "day", "roof"),
        (day, 0.385, 0.8, "day", "wall"),
        (day, 0.34, 0.84, "day", "window"),
        (day, 0.87, 0.8, "day", "pine"),
        (day, 0.5, 0.97, "day", "bank"),
        (night, 0.72, 0.22, "night", "sun"),
        (night, 0.5, 0.97, "night", "bank"),
    ):
        assert torch.allclose(at(picture, x, y), color(time, name), atol=1e-6), name
    assert not torch.allclose(at(night, 0.87, 0.8), color("night", "pine"), atol=0.01)


@pytest.mark.quick
def test_only_clouds_are_left_to_the_seed():
    still, moved = drawn(*(replace(SCENES[0], drift=d) for d in (-1.0, 1.0)))
    changed = (still - moved).abs().amax(-1) > 0
    assert 0.01 < changed.float().mean() < 0.03
    rows = changed.any(1).nonzero().flatten()
    assert rows.max() < 8 * SKY // 16  # the training draws the skies apart


@pytest.mark.quick
def test_every_scene_has_a_caption_of_its_own():
    words = (landscapes.TERRAINS, landscapes.TIMES, landscapes.PLACES, landscapes.GROUNDS)
    scenes = product(*words, landscapes.PINES, landscapes.CABINS)
    captions = [landscapes.Scene(*scene).caption for scene in scenes]
    assert len(captions) == len(set(captions)) == 768
    assert set(landscapes.CAPTIONS) < set(captions)
    assert SCENES[0].caption == "hills at day, sun left, meadow, one pine, one cabin"
    assert SCENES[1].caption == "volcano at night, moon right, lake, no pines, no cabin"


@pytest.mark.quick
def test_codec_keeps_the_pictures():
    pictures = drawn(*SCENES)
    latents = landscapes.encode(pictures)
    assert latents.shape == (2, 16, 32, 32)
    assert metrics.psnr_db(pictures, landscapes.decode(latents), 1.0) > 34
    assert 0.5 < latents.std() < 1.5


@pytest.mark.quick
def test_text_encoding():
    context, pooled = landscapes.encode_caption(SCENES[0].caption)
    assert context.shape == (16, 128)
    assert pooled.shape == (128,)
    bare, _ = landscapes.encode_caption(SCENES[0].caption.replace(",", ""))
    assert torch.equal(context, bare)
    plural, _ = landscapes.encode_caption(SCENES[0].caption.replace("pine", "pines"))
    assert torch.equal(context, plural)
    other, _ = landscapes.encode_caption(SCENES[0].caption.replace("left", "right"))
    assert (context != other).any(1).nonzero().flatten().tolist() == [4]
    empty, _ = landscapes.encode_caption("")
    assert empty.abs().sum(1).min() > 0


def test_training_starts_with_places(monkeypatch):
    """Before the first step image tokens attend to the slot of the text with their column's number, in the
    first head, and their row's in the second."""
    from diffusers.models.transformers import transformer_flux

    model = MODEL.build()
    contexts, pooled = MODEL.encode_captions([s.caption for s in SCENES] + [""])
    start_with_places(model, contexts)
    attend, seen = transformer_flux.dispatch_attention_fn, []

    def watched(q, k, v, **options):
        seen.append(torch.einsum("bqhd,bkhd->bhqk", q, k))
        return attend(q, k, v, **options)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", watched)
    with torch.no_grad():
        predict(model, torch.randn(3, 16, 32, 32), torch.full((3,), 0.9), contexts, pooled)
    slots = seen[0][:, :, 16:, :16].argmax(-1).view(3, 2, 16, 16)
    number = torch.arange(16)
    assert torch.equal(slots[:, 0], number.expand(3, 16, 16))
    assert torch.equal(slots[:, 1], number[:, None].expand(3, 16, 16))


def test_shipped_model_draws_its_captions():
    want = drawn(*SCENES)
    got = landscapes.decode(MODEL.sample(MODEL.load(), [s.caption for s in SCENES], steps=12, seed=1))
    right = [metrics.psnr_db(a, b, 1.0) for a, b in zip(want, got, strict=True)]
    wrong = [metrics.psnr_db(a, b, 1.0) for a, b in zip(want.flip(0), got, strict=True)]
    assert min(right) > 31
    assert min(right) > max(wrong) + 10
    assert 0.7 < metrics.high_frequency_ratio(want, got) < 1.1
