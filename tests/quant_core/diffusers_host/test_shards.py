"""A calibration in shards on a whole pipeline: the sums of one run, tokens of its own, stopped and gone on
with."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from comfyui_nibble.quant_core.calibration import Calibration, CalibrationError
from comfyui_nibble.quant_core.diffusers_host import pipeline as host
from comfyui_nibble.quant_core.diffusers_host import shards
from comfyui_nibble.quant_core.diffusers_host.pipeline import calibrate_pipeline
from comfyui_nibble.quant_core.diffusers_host.shards import calibrate_in_shards
from comfyui_nibble.quant_core.evaluation import pipelines
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.evaluation.pipelines import FULL
from comfyui_nibble.quant_core.store import atomic
from comfyui_nibble.quant_core.store.atomic import NoRoom, require_free
from comfyui_nibble.tests.assets.pipelines import PROMPTS
from comfyui_nibble.tests.support import relative_error

ASKED = {"samples": 8, "steps": 2, "size": 64, "seed": 3, "memory": 2**30, "device": "cpu"}


@pytest.fixture(scope="module")
def sharded(pipeline, tmp_path_factory):
    return calibrate_in_shards(pipeline, tmp_path_factory.mktemp("s") / "c", PROMPTS, **ASKED)


def test_sums_are_those_of_one_run(pipeline, sharded, tmp_path):
    whole = calibrate_pipeline(
        pipeline, tmp_path / "c", PROMPTS, **ASKED, progress=lambda items, total: items
    )
    assert sharded.names == whole.names
    assert sharded.meta["samples"] == 8
    assert sharded.meta["model"] == whole.meta["model"]
    for name in whole.names:
        ours, theirs = sharded.get(name), whole.get(name)
        assert torch.equal(ours.absmax, theirs.absmax)
        assert ours.count == theirs.count
        assert len(ours.tokens) == len(theirs.tokens)
        for key, hessian in theirs.hessians.items():
            assert relative_error(hessian, ours.hessians[key]) < 1e-6


def test_second_moments_are_added_as_a_tree(sharded, pipeline, tmp_path):
    """Of the two shards, one after the other."""
    unit = shards.OneShard(pipeline, tmp_path, PROMPTS, **ASKED)
    parts = [Calibration(unit.place(unit(first))) for first in (0, 4)]
    name = "double_blocks.0.img_mlp.2"
    want = [part.get(name).hessians for part in parts]
    found = sharded.get(name).hessians
    assert found.keys() == want[0].keys()
    for key in found:
        assert torch.equal(found[key], want[0][key] + want[1][key])


def test_recorded_calls_of_the_first_shard_are_taken_along(sharded):
    assert {call.sample for call in sharded.trajectory().calls} <= {0, 1, 2, 3}


def test_a_stopped_run_goes_on_with_the_same_bytes(pipeline, sharded, tmp_path, monkeypatch):
    real, seen = shards.OneShard.__call__, []

    def dies(self, first):
        if first == 4 and not seen:
            seen.append(first)
            raise KeyboardInterrupt
        return real(self, first)

    monkeypatch.setattr(shards.OneShard, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate_in_shards(pipeline, tmp_path / "c", PROMPTS, **ASKED)
    assert [p.name for p in (tmp_path / "c.shards").iterdir()] == ["shard-00000"]
    made = calibrate_in_shards(pipeline, tmp_path / "c", PROMPTS, **ASKED)
    assert made.hash == sharded.hash
    for ours, theirs in zip(made.files, sharded.files, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert not (tmp_path / "c.shards").exists()


def test_a_finished_one_is_found_and_another_stays(pipeline, sharded, tmp_path):
    copy = tmp_path / "c"
    shutil.copytree(sharded.path, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.OneShard, "__call__", None)
        assert calibrate_in_shards(pipeline, copy, PROMPTS, **ASKED).hash == sharded.hash
        with pytest.raises(CalibrationError, match="holds another calibration. Name another folder"):
            calibrate_in_shards(pipeline, copy, PROMPTS, **ASKED | {"steps": 3})


def test_a_transformer_that_no_gpu_holds_is_refused_before_anything_is_loaded(
    pipeline, tmp_path, monkeypatch
):
    needed = 2 * sum(p.numel() for p in load_file(tiny_flux.CHECKPOINT).values())
    monkeypatch.setattr(host, "gpu_bytes", lambda device: needed - 1)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    found = re.escape(f"takes {needed / 1e9:.1f} GB in bf16, and the GPU cuda has {needed / 1e9:.1f} GB")
    with pytest.raises(ValueError, match=rf"flux.*: its transformer {found}\. Take a GPU that holds"):
        calibrate_in_shards(pipeline, tmp_path / "c", PROMPTS, **ASKED | {"device": "cuda"})
    files = {FULL: None}
    sampling = pipelines.Sampling(pipeline, tmp_path, files, PROMPTS, 1, None, 0, "cuda")
    with pytest.raises(ValueError, match="its transformer takes"):
        pipelines.sample_all(sampling)


def test_a_disk_that_does_not_hold_all_shards_is_refused_before_anything_is_loaded(
    pipeline, sharded, tmp_path, monkeypatch
):
    """Of two shards and their sum the files are what was said, but for headers and tokens that were not
    kept."""
    asked = []
    monkeypatch.setattr(shards, "require_free", lambda path, needed: asked.append((path, needed)))
    monkeypatch.setattr(shards.OneShard, "__call__", lambda self, first: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        calibrate_in_shards(pipeline, tmp_path / "c", PROMPTS, **ASKED)
    ((path, needed),) = asked
    assert path.parent == tmp_path / "c.shards"
    written = 3 * sum(f.stat().st_size for f in sharded.files if "calls" not in f.name)
    assert 0.5 * needed < written < 1.1 * needed

    monkeypatch.setattr(shards, "require_free", require_free)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(NoRoom, match=rf"{needed / 1e6:,.1f} MB are needed, .* Make room, or choose another"):
        calibrate_in_shards(pipeline, tmp_path / "c", PROMPTS, **ASKED)


@pytest.mark.quick
def test_shards_of_thousands_of_samples_are_longer_not_more():
    """Their statistics lie on the disk until all are there."""
    assert [shards.shard_of(n) for n in (1, 16, 512, 513, 5000)] == [4, 4, 4, 5, 40]
    unit = shards.OneShard(Path("p"), Path("f"), ["a"], 5000, 1, None, 0, 2**30, "cpu")
    places = [unit.place(first).name for first in range(0, 5000, 40)]
    assert places == [f"shard-{i:05d}" for i in range(125)]


def test_classes_are_spread_over_all_samples(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        '{"_class_name": "DiTTransformer2DModel", "num_embeds_ada_norm": 1000}'
    )
    assert shards._classes(tmp_path, 4) == ["0", "250", "500", "750"]
    assert shards._classes(tmp_path / "none", 4) is None
