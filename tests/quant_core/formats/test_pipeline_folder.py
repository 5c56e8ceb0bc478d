import json

import pytest
import torch

from comfyui_nibble.quant_core.formats.pipeline_folder import origin_of
from comfyui_nibble.quant_core.store.safe import CheckpointError

pytestmark = pytest.mark.quick

SDXL = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"}


def folder(path, config, scheduler=None):
    for name, content in (("unet/config.json", config), ("scheduler/scheduler_config.json", scheduler)):
        if content is not None:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path / "unet"


@pytest.mark.parametrize(
    ("scheduler", "markers"),
    [
        ({"prediction_type": "v_prediction"}, {"v_pred": []}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred": [], "ztsnr": []}),
        ({"_class_name": "EDMEulerScheduler"}, {"edm_mean": [0, 0, 0, 0], "edm_std": [1, 1, 1, 1]}),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_max": 120.0}, {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}),
        ({"prediction_type": "epsilon"}, {}),
        (None, {}),
    ],
)  # fmt: skip
def test_the_scheduler_says_what_comfyui_reads_off_markers(tmp_path, scheduler, markers):
    found = origin_of(folder(tmp_path, SDXL, scheduler))
    assert set(found.beside) == set(markers)
    for name, value in markers.items():
        torch.testing.assert_close(found.beside[name], torch.tensor(value, dtype=torch.float32))
    assert json.loads(found.metadata["diffusers_config"]) == SDXL


def test_only_sdxl_has_such_markers(tmp_path):
    found = origin_of(
        folder(tmp_path, {"_class_name": "FluxTransformer2DModel"}, {"prediction_type": "v_prediction"})
    )
    assert not found.beside
    assert not origin_of(tmp_path).metadata


def test_configurations_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        origin_of(folder(tmp_path, "{"))
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object, found list"):
        origin_of(folder(tmp_path, []))
