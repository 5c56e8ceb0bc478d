"""What a diffusers pipeline folder says of its model in files of their own, as an Origin: the config, the
scheduler's prediction type."""

import json
from pathlib import Path

import torch

from ..store.safe import CheckpointError, open_safetensors
from .origin import METADATA_BYTES, Origin
from .shards import require_no_pickles

CONFIG = "diffusers_config"  # header entry that keeps the text of config.json


def origin_of(folder: Path) -> Origin:
    """Of the `transformer` or `unet` folder at `folder`; empty where it has no config.json of diffusers.

    An SDXL U-Net gets the marker tensors by which ComfyUI knows v-prediction and EDM, since only the
    scheduler beside it says so. Raises CheckpointError for configurations that are no JSON objects.
    """
    own, of_scheduler = configurations(folder)
    config = _json(own)
    if "_class_name" not in config:
        return Origin()
    sdxl = (
        config["_class_name"] == "UNet2DConditionModel" and config.get("addition_embed_type") == "text_time"
    )
    beside = _markers(_json(of_scheduler)) if sdxl else {}
    return Origin({CONFIG: json.dumps(config, sort_keys=True)}, beside=beside)


def configurations(folder: Path) -> list[Path]:
    """Where the model in a folder has its own configuration and that of its scheduler, if it has them."""
    return [folder / "config.json", folder.parent / "scheduler" / "scheduler_config.json"]


def require_safetensors(pipeline: Path):
    """Raises CheckpointError where a component that model_index.json names has its weights in pickled files
    only, naming one of them; also for a configuration that is no JSON object, and a header that is none."""
    for name, what in _json(pipeline / "model_index.json").items():
        if isinstance(what, list) and Path(name).name == name:
            require_no_pickles(pipeline / name)
            for part in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
                _json(pipeline / name / part)
            for file in (pipeline / name).glob("*.safetensors"):
                open_safetensors(file)


def _markers(scheduler: dict) -> dict[str, torch.Tensor]:
    """ComfyUI's names for SDXL (`comfy.supported_models.SDXL.model_type`); it reads values of the sigmas
    alone."""
    kind = scheduler.get("prediction_type", "epsilon")
    if str(scheduler.get("_class_name", "")).startswith("EDM"):
        if kind == "epsilon":
            return {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
        sigmas = {
            "sigma_max": float(scheduler.get("sigma_max", 80.0)),
            "sigma_min": float(scheduler.get("sigma_min", 0.002)),
        }
        return {f"edm_vpred.{name}": torch.tensor(value) for name, value in sigmas.items()}
    if kind != "v_prediction":
        return {}
    return {"v_pred": torch.empty(0)} | (
        {"ztsnr": torch.empty(0)} if scheduler.get("rescale_betas_zero_snr") else {}
    )


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    if path.stat().st_size > METADATA_BYTES:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, expected a configuration of at most {METADATA_BYTES}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
