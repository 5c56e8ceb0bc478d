"""What is measured with whole models on a real Ray cluster: the same with any number of workers."""

import json
import shutil

import pytest

from comfyui_nibble.quant_core.cli.allocate import measured_gains
from comfyui_nibble.quant_core.diffusers_host.shards import calibrate_in_shards
from comfyui_nibble.quant_core.evaluation.ablate import run as ablation
from comfyui_nibble.quant_core.evaluation.ablate.splitquant import Entry
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.training.presets import Preset
from comfyui_nibble.quant_core.training.reconstruct import TrainConfig
from comfyui_nibble.tests.assets.pipelines import PROMPTS
from comfyui_nibble.tests.assets.small_flux import small
from comfyui_nibble.tests.quant_core.evaluation.ablate.test_run import SMALL
from comfyui_nibble.tests.quant_core.run.test_stages import FAST, same_layers, without_seconds

__all__ = ["small"]
pytest.importorskip("ray", reason="Ray is not installed: the extra [cluster] has it")
ABLATED = [Entry(name, METHODS[name], pictures=name == "rtn") for name in ("rtn", "convrot")]


@pytest.fixture(scope="module")
def sampled_alone(tmp_path_factory, pipeline, one_thread):
    """The statistics and the gains of a pipeline that one process measures."""
    return _sampled(tmp_path_factory.mktemp("sampled") / "c", pipeline)


def _sampled(folder, pipeline, **workers):
    """Four shards, the last of one sample."""
    asked = {"samples": 13, "steps": 1, "size": 64, "seed": 3, "memory": 2**28, "device": "cpu"}
    made = calibrate_in_shards(pipeline, folder, PROMPTS, **asked, **workers)
    return made, measured_gains(pipeline / "transformer", made, samples=1, **workers)


def test_statistics_and_gains_of_a_pipeline_are_those_of_one_process(
    tmp_path, pipeline, sampled_alone, cluster
):
    ours, gains = _sampled(tmp_path / "c", pipeline, workers=cluster)
    theirs, expected = sampled_alone
    assert [f.read_bytes() for f in ours.files] == [f.read_bytes() for f in theirs.files]
    assert gains == expected
    assert not list(tmp_path.glob("*.shards"))


@pytest.fixture(scope="module")
def measured_alone(tmp_path_factory, one_thread):
    """(the folder, the rows) of an ablation that one process measures."""
    folder = tmp_path_factory.mktemp("ablation")
    return folder, ablation.run(folder, ABLATED, best=0, **SMALL)


def test_rows_of_an_ablation_are_those_of_one_process(tmp_path, measured_alone, cluster):
    folder, expected = measured_alone
    shutil.copytree(folder / "calibration", tmp_path / "calibration")
    rows = ablation.run(tmp_path, ABLATED, best=0, **SMALL, workers=cluster)
    untimed = lambda row: {k: v for k, v in row.items() if k != "seconds"}
    assert [untimed(row) for row in rows] == [untimed(row) for row in expected]
    assert len(json.loads((tmp_path / "rows.json").read_text())["layers"]) == len(ABLATED)


def test_a_training_takes_layers_that_a_cluster_has_fitted(tmp_path, small, one_thread, pair):
    """Those of a block come in any order, and its training is done here."""
    preset = Preset(TrainConfig(("scale", "bias"), steps=1, calls=2), None)
    theirs, expected, _ = small.quantize(tmp_path / "here", preset, **FAST)
    ours, rows, _ = small.quantize(tmp_path / "there", preset, workers=pair, **FAST)
    same_layers(ours, theirs)
    assert without_seconds(rows) == without_seconds(expected)
