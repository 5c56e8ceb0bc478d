"""`nibble judge` on a whole small pipeline: what it measures, and what a second run takes over."""

import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_nibble.quant_core.cli import judge
from comfyui_nibble.quant_core.cli.judge import judge_pipeline
from comfyui_nibble.quant_core.diffusers_host.pipeline import calibrate_pipeline
from comfyui_nibble.quant_core.evaluation import pipelines
from comfyui_nibble.quant_core.evaluation.demo.metrics import psnr_db
from comfyui_nibble.quant_core.evaluation.pipelines import FULL
from comfyui_nibble.tests.assets.pipelines import PROMPTS
from comfyui_nibble.tests.support import nibble

ASKED = {"steps": 2, "size": 64, "seed": 5}


@pytest.fixture(scope="module")
def calibration(pipeline, tmp_path_factory):
    asked = {"samples": 4, "steps": 2, "size": 64, "seed": 0, "memory": 2**30, "device": "cpu"}
    return calibrate_pipeline(
        pipeline, tmp_path_factory.mktemp("c") / "c", PROMPTS, **asked, progress=lambda items, total: items
    )


@pytest.fixture(scope="module")
def done(pipeline, calibration, tmp_path_factory):
    """(the folder, what the command prints)."""
    out = tmp_path_factory.mktemp("judge")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    text = nibble(
        "judge", pipeline, out / "out", "--calibration", calibration.path, "--methods", "convrot, rtn",
        "--prompts", out / "prompts.txt", "--steps", 2, "--size", 64, "--seed", 5, "--device", "cpu",
    )  # fmt: skip
    return out / "out", text


def test_figures_are_those_of_the_pictures(done):
    out, text = done
    found = json.loads((out / "judge.json").read_text())
    assert found["base"] == "convrot"
    assert found["methods"].keys() == {"convrot", "rtn"}
    pictures = {p.parent.name: [] for p in sorted(out.glob("pictures-*/*/*.npy"))}
    for path in sorted(out.glob("pictures-*/*/*.npy")):
        pictures[path.parent.name].append(torch.from_numpy(np.load(path)).float())
    assert {name: len(made) for name, made in pictures.items()} == {
        "full_precision": 3,
        "convrot": 3,
        "rtn": 3,
    }
    rtn = found["methods"]["rtn"]
    for want, got, db in zip(pictures["full_precision"], pictures["rtn"], rtn["each_psnr_db"], strict=True):
        assert db == pytest.approx(psnr_db(want, got, 1.0), abs=1e-9)
        assert 10 < db < 60
    assert rtn["paired"]["count"] == 3
    assert found["methods"]["convrot"]["paired"] is None
    assert "rtn" in text
    assert "of 3" in text
    with Image.open(out / "judge.png") as sheet:
        assert sheet.width > 3 * 64
        assert sheet.height > 3 * 64


def test_full_precision_is_the_pipeline_itself(done, pipeline):
    out, _ = done
    pipe = pipelines.load_pipeline(pipeline, "cpu")
    made = pipe(
        PROMPTS[1], num_inference_steps=2, width=64, height=64, output_type="np",
        generator=torch.Generator().manual_seed(6),
    ).images[0]  # fmt: skip
    (path,) = out.glob("pictures-*/full_precision/00001.npy")
    assert np.array_equal(np.load(path), made.astype(np.float16))


def test_a_second_run_makes_nothing_again_and_others_have_their_own_pictures(
    done, pipeline, calibration, monkeypatch
):
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    monkeypatch.setattr(judge, "quantize_file", None)
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    again = judge_pipeline(pipeline, out, ["convrot", "rtn"], calibration, PROMPTS, **ASKED)
    assert "rtn" in again
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} == before
    with pytest.raises(TypeError, match="not callable"):  # another seed is another judgement
        judge_pipeline(pipeline, out, ["convrot", "rtn"], calibration, PROMPTS, **ASKED | {"seed": 9})


def test_what_it_refuses_before_anything_is_made(tmp_path, pipeline, calibration):
    with pytest.raises(ValueError, match="1 methods, 1 prompts: expected at least one method and two"):
        judge_pipeline(pipeline, tmp_path / "o", ["rtn"], calibration, PROMPTS[:1], **ASKED)
    with pytest.raises(ValueError, match="unknown method 'magic'"):
        judge_pipeline(pipeline, tmp_path / "o", ["rtn", "magic"], calibration, PROMPTS, **ASKED)
    assert not list(tmp_path.glob("o/*.safetensors"))


@pytest.mark.quick
def test_thousands_of_pictures_are_judged_two_at_a_time(tmp_path, monkeypatch):
    """5,000 pictures of 3 MB in fp32 would be 30 GB."""
    files = {FULL: None, "a": tmp_path, "b": tmp_path}
    sampling = pipelines.Sampling(tmp_path, tmp_path, files, ["p"] * 5000, 1, None, 0, "cpu")
    held: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def picture(self, name, index):
        nonlocal most
        made = torch.full((8, 8, 3), len(name) / 40 + index / 1e5)
        held.add(made)
        most = max(most, len(held))
        return made

    monkeypatch.setattr(pipelines.Sampling, "picture", picture)
    monkeypatch.setattr(pipelines, "ssim", lambda want, got: 1.0)
    found = pipelines.judged(sampling, "a")
    assert found["b"]["paired"]["count"] == 5000
    assert most <= 4  # those of one comparison, those of the next before the last are gone


def test_pictures_of_the_same_content_are_judged_equal(tmp_path):
    """A method that draws what full precision draws has no finite dB: 200 are the figure's ceiling."""
    sampling = pipelines.Sampling(
        tmp_path, tmp_path, {FULL: None, "same": tmp_path}, ["a", "b"], 1, None, 0, "cpu"
    )
    for name in sampling.files:
        for i in range(2):
            sampling.place(name, i).parent.mkdir(exist_ok=True)
            np.save(sampling.place(name, i), np.full((8, 8, 3), 0.25, np.float16))
    assert pipelines.judged(sampling, "same")["same"]["each_psnr_db"] == [200.0, 200.0]
