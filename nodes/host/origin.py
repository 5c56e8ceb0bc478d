"""What ComfyUI made of a model's source, as a record for files: its class and config, prediction type,
sampling settings, latent format."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import comfy.model_detection
import comfy.model_sampling as sampling
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_core.formats.origin import Origin, encoded
from ...quant_core.store.safe import CheckpointError, open_safetensors
from .bare import NETWORK, bare

_MADE = ("model_sampling", "noise_augmentor")  # by constructors, from the settings
_SET_BY_NODES = ("model_sampling", "latent_format")  # of the model's parts, what a file has a record of
_DISCRETE = ("EPS", "V_PREDICTION")
ATTACHMENT = "nibble"  # what a Nibble model knows of itself; clones share it


class UnrecordedModel(RuntimeError):
    """A model of which a file cannot say what it is."""


def origin_of(patcher: ModelPatcher, known: Origin | None = None) -> Origin:
    """The Origin of a MODEL, to be called within `bare`: `host` says what it is, `beside` holds its tensors
    outside of the network.

    Header entries are those that are `known` already, or come from the file that ComfyUI loaded it from,
    where it still says which. Raises UnrecordedModel for a config that has no form in a file.
    """
    model, config = patcher.model, patcher.model.model_config
    host = {
        "class": type(config).__name__,
        "model": type(model).__name__,
        "unet_config": {k: v for k, v in config.unet_config.items() if k != "dtype"},
        "model_type": model.model_type.name,
        "sampling_settings": dict(config.sampling_settings or {}),
        "latent_format": type(model.latent_format).__name__,
    }
    for key, value in host.items():
        try:
            encoded(value)
        except TypeError as error:
            raise UnrecordedModel(
                f"the {key} of this {host['class']} model cannot be written to a file: {error}. Quantize the "
                "model as ComfyUI's own loaders give it."
            ) from error
    own = outside_tensors(model)
    host["outside"] = names = _names_in_checkpoints(model, own)
    header = known or Origin.of_header(_header(patcher))
    metadata = dict(header.metadata) | _config(model, header.metadata, config)
    return Origin(
        metadata, host, {names[key]: t.cpu() for key, t in own.items()} | _markers(host), header.dropped
    )


def as_sampled(patcher: ModelPatcher, origin: Origin) -> Origin:
    """The Origin for a file of a model on which a node may have set another prediction type.

    v-prediction and its zero terminal SNR are kept, as ComfyUI's own save nodes keep them. Of any other
    sampling or latent format that a node has set, the log says that the file is without it.
    """
    lost = {name: patcher.object_patches[name] for name in _SET_BY_NODES if name in patcher.object_patches}
    kind = _discrete(lost.get("model_sampling"))
    if kind is not None:
        with bare(patcher):
            found = origin_of(patcher, origin)
        if found.host["model_type"] in _DISCRETE:
            settings = found.host["sampling_settings"] | {"zsnr": bool(lost.pop("model_sampling").zsnr)}
            host = dict(found.host) | {"model_type": kind, "sampling_settings": settings}
            beside = {name: t for name, t in found.beside.items() if name not in ("v_pred", "ztsnr")}
            origin = replace(found, host=host, beside=beside | _markers(host))
    for name, value in lost.items():
        logging.warning(
            f"Nibble: the file is without the {name} ({type(value).__name__}) that a node has set on this "
            "model. Put that node behind Nibble Load Diffusion Model as well."
        )
    return origin


def _discrete(value) -> str | None:
    """The name of its ModelType, of what ModelSamplingDiscrete and ComfyUI itself make of EPS and
    V_PREDICTION; None for any other sampling."""
    kinds = {
        (sampling.ModelSamplingDiscrete, sampling.EPS): "EPS",
        (sampling.ModelSamplingDiscrete, sampling.V_PREDICTION): "V_PREDICTION",
    }
    return kinds.get(type(value).__bases__)


def outside_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{key: tensor} of a BaseModel, all but the network's and the schedules'; in the model's own memory."""
    own = {
        key: tensor.detach()
        for name, child in model.named_children()
        if name not in (NETWORK, *_MADE)
        for key, tensor in child.state_dict(prefix=f"{name}.").items()
    }
    return own | {key: p.detach() for key, p in model.named_parameters(recurse=False)}


def _names_in_checkpoints(model, own) -> dict[str, str]:
    """{key: ComfyUI's own name for saving}, where a class has one (Stable Audio), else the key; its tensors
    share their memory with the model's."""
    if not own:
        return {}
    saved = {
        (t.data_ptr(), t.shape): name for name, t in model.state_dict_for_saving({}).items() if t.numel()
    }
    return {key: saved.get((t.data_ptr(), t.shape), key) for key, t in own.items()}


def _markers(host) -> dict[str, torch.Tensor]:
    """The tensors by which ComfyUI knows the prediction type of an SDXL checkpoint, for files that it loads
    without this pack."""
    settings = host["sampling_settings"]
    if host["model"] != "SDXL":
        return {}
    if host["model_type"] == "V_PREDICTION":
        return {"v_pred": torch.empty(0)} | ({"ztsnr": torch.empty(0)} if settings.get("zsnr") else {})
    if host["model_type"] == "EDM":
        return {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    if host["model_type"] == "V_PREDICTION_EDM":
        return {
            f"edm_vpred.{k}": torch.tensor(float(settings[k]))
            for k in ("sigma_max", "sigma_min")
            if k in settings
        }
    return {}


def source_path(patcher: ModelPatcher) -> Path | None:
    """The safetensors file that a loader of ComfyUI read the model from; None where it does not say."""
    _, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
    paths = (a for a in arguments if isinstance(a, str) and a.lower().endswith((".safetensors", ".sft")))
    return next(map(Path, paths), None)


def _header(patcher) -> dict[str, str]:
    """Header entries of the file that a loader of ComfyUI read the model from; {} where it is not known or
    not there any more."""
    if (path := source_path(patcher)) is None or not path.is_file():
        return {}
    try:
        return open_safetensors(path).metadata() or {}
    except CheckpointError as error:
        logging.warning(f"Nibble: header entries of the source are not kept: {error}")
        return {}


def _config(model, metadata, config) -> dict[str, str]:
    """The header entry `config` by which ComfyUI's detection finds this model, where the weights and the
    source's header do not show it."""
    shown = {k: torch.empty(t.shape, device="meta") for k, t in model.diffusion_model.state_dict().items()}
    want = _identity(config)
    plain = detected(shown, {})
    if plain is None or want in (plain, detected(shown, metadata)):
        return {}
    differing = {k: v for k, v in want[1].items() if k not in plain[1] or plain[1][k] != v}
    try:
        text = json.dumps({"transformer": differing})
    except TypeError:
        return {}
    return {"config": text} if detected(shown, {"config": text}) == want else {}


def detected(shown: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[type, dict] | None:
    """(class, unet_config) by ComfyUI's detection on tensors that may be on the meta device; None where it
    knows no such model."""
    try:
        config = comfy.model_detection.model_config_from_unet(shown, "", metadata=dict(metadata))
    except Exception:  # names and shapes of a foreign model make it fail in any way
        return None
    return None if config is None else _identity(config)


def _identity(config) -> tuple[type, dict]:
    """Entries that a class asks for are put back: its models change them (FlowRVS is a `t2v` afterwards)."""
    return type(config), {k: v for k, v in config.unet_config.items() if k != "dtype"} | type(
        config
    ).unet_config
