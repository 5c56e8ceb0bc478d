"""Nibble Compare on the small FLUX, in ComfyUI's own code."""

import re

import pytest
import torch

from comfyui_nibble.quant_core.evaluation.demo import metrics, pictures


class Decoder:
    """The small model's decoder in the place of a VAE. frames: pictures as a video has them."""

    def __init__(self, frames=0):
        self.frames = frames

    def decode(self, latent):
        import comfy.latent_formats

        found = pictures.decode(comfy.latent_formats.Flux().process_in(latent))
        return torch.stack([found] * self.frames, 1) if self.frames else found


@pytest.fixture(scope="module")
def models(full, packed, tiny_state, one_thread):
    """In full precision, at 4 bits and ternary."""
    return full, packed(tiny_state, "rtn")(), packed(tiny_state, "robuq", rank=0)()


@pytest.fixture
def compare(comfy, tmp_path, monkeypatch):
    """The node with four steps: (picture, pictures, difference, figures, image_a, image_b)."""
    import folder_paths

    from comfyui_nibble.nodes.compare import NibbleCompare

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    context, pooled = pictures.encode_caption("large red circle center on plain blue background")
    prompt = [[context[None], {"pooled_output": pooled[None], "guidance": 3.5}]]

    def run(a, b, c=None, *, cfg=1.0, seed=3, **options):
        options = {"vae": Decoder(), "latent_image": {"samples": torch.zeros(1, 16, 16, 16)}} | options
        settings = {"sampler_name": "euler", "scheduler": "simple", "steps": 4, "theme": "dark"}
        found = NibbleCompare.execute(a, b, prompt, model_c=c, cfg=cfg, seed=seed, **settings, **options)
        return found.args

    return run


def table(figures):
    """{line: its values} of the Markdown."""
    rows = [line.strip("| ").split(" | ") for line in figures.splitlines() if line.startswith("|")]
    return {name: values for name, *values in rows}


def test_three_models_from_the_same_noise(compare, models):
    picture, three, apart, figures, a, b = compare(*models)
    assert three.shape == (3, 64, 64, 3)
    assert torch.equal(three[:1], a)
    assert torch.equal(three[1:2], b)
    assert picture.shape[0] == 1
    assert picture.shape[2] > 3 * 448
    assert apart.shape == (2, 64, 64, 3)
    found = table(figures)
    (head,) = (name for name in found if name.startswith("Against A: float32, "))
    assert [name.split(",")[0] for name in found[head]] == ["B: quantized", "C: quantized"]
    psnr = [metrics.psnr_db(three[0], x, 1.0) for x in three[1:]]
    assert found["Picture, PSNR"] == [f"{db:.1f} dB" for db in psnr]
    assert found["Picture, SSIM"] == [f"{metrics.ssim(three[:1], x[None]):.3f}" for x in three[1:]]
    assert 15 < psnr[1] < psnr[0] < 40
    assert max(line.count("|") for line in figures.splitlines()) == 4
    assert apart[1].mean() > apart[0].mean()


def test_a_model_against_itself_has_no_difference(compare, models):
    _, both, apart, figures, *_ = compare(models[1], models[1])
    assert torch.equal(both[0], both[1])
    assert apart.max() < 0.02
    assert table(figures)["Picture, SSIM"] == ["1.000"]
    assert table(figures)["Fine detail"] == ["100 %"]


def test_the_seed_is_that_of_ksampler(compare, full):
    import comfy.latent_formats
    import comfy.sample

    _, both, *_ = compare(full, full, seed=11)
    context, pooled = pictures.encode_caption("large red circle center on plain blue background")
    prompt = [[context[None], {"pooled_output": pooled[None], "guidance": 3.5}]]
    latent = torch.zeros(1, 16, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 11)
    want = comfy.sample.sample(full, noise, 4, 1.0, "euler", "simple", prompt, prompt, latent, seed=11)
    assert torch.allclose(both[0], Decoder().decode(want)[0], atol=1e-5)


def test_without_a_vae_it_is_a_preview(compare, models):
    _, both, _, figures, *_ = compare(*models[:2], vae=None)
    assert both.shape == (2, 128, 128, 3)
    assert figures.splitlines()[-1] == "- The picture is a rough preview: no VAE is connected."
    assert "Fine detail" not in figures  # a rough picture has none
    assert both.min() >= 0
    assert both.max() <= 1


def test_videos_are_strips_of_frames(compare, models):
    picture, frames, apart, *_ = compare(*models[:2], vae=Decoder(frames=6))
    assert frames.shape == (12, 64, 64, 3)
    assert apart.shape == (1, 4 * 64, 64, 3)
    assert picture.shape[1] > 2 * 4 * 448


def test_one_frame_is_a_picture(compare, models):
    _, both, apart, *_ = compare(*models[:2], vae=Decoder(frames=1))
    assert both.shape == (2, 64, 64, 3)
    assert apart.shape == (1, 64, 64, 3)


def test_refusals(compare, models, comfy, monkeypatch):
    with pytest.raises(ValueError, match=re.escape("'cfg' is 3.5 and 'negative' is not connected")):
        compare(*models[:2], cfg=3.5)
    other = models[1].clone()
    import comfy.latent_formats

    other.add_object_patch("latent_format", comfy.latent_formats.SDXL())
    with pytest.raises(
        ValueError, match="latents of 'model_c' are of the kind SDXL, those of 'model_a' of Flux"
    ):
        compare(*models[:2], other)


class Kind:
    """A MODEL's latent format alone."""

    def __init__(self, latent_format):
        self.latent_format = latent_format

    def get_model_object(self, name):
        assert name == "latent_format"
        return self.latent_format


@pytest.mark.parametrize(
    ("kind", "latent", "picture"),
    [
        ("Flux", (2, 16, 8, 6), (2, 64, 48, 3)),
        ("Wan21", (1, 16, 3, 8, 6), (1, 3, 64, 48, 3)),
        ("Wan21", (1, 16, 1, 8, 6), (1, 64, 48, 3)),
        ("Flux2", (1, 128, 4, 3), (1, 64, 48, 3)),
        ("LatentFormat", (1, 4, 8, 6), (1, 64, 48, 3)),
    ],
)
def test_rough_pictures_are_as_large_as_those_of_a_vae(comfy, kind, latent, picture):
    import comfy.latent_formats

    from comfyui_nibble.nodes.host.decoding import decoded

    form = getattr(comfy.latent_formats, kind)()
    found = decoded(torch.randn(latent, generator=torch.Generator().manual_seed(0)), Kind(form), None)
    assert found.shape == picture
    assert 0 <= found.min() < found.max() <= 1
