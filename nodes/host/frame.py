"""An empty ComfyUI model for packed layers: after the MODEL at hand, by the record in a file, or by ComfyUI's
own detection."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable

import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

from ...quant_core.formats.origin import Origin, names_text
from .bare import NETWORK, bare
from .operations import operations_for
from .origin import ATTACHMENT, origin_of, outside_tensors

# What a fresh model has of its own and not from the one that it is made after.
_FRESH = ("current_patcher", "model_config", "manual_cast_dtype", "device", "training")


class DetectionError(RuntimeError):
    """This ComfyUI does not know the model, or cannot make it."""


class IncompleteModel(RuntimeError):
    """Tensors of the model are missing."""


class Frame:
    """A BaseModel whose network has no weights yet, and the Origin of the model.

    network_names: whether tensors come under the network's own names, as a MODEL has them, or under a
    checkpoint's, which ComfyUI renames as it loads.
    """

    def __init__(self, make: Callable, origin: Origin, network_names: bool, prepare: Callable) -> None:
        self._take, self._renamed = None, {}
        operations = operations_for(lambda name: self._take(self._renamed.get(name, name)), prepare)
        self.origin, self.network_names, self._model = origin, network_names, make(operations)

    def require_modules(self, keys: Iterable[str]) -> None:
        """Raises DetectionError for tensors whose modules ComfyUI's class does not make: blocks that a pack
        has replaced in the network itself, or parametrized weights."""
        made = {name for name, _ in self._model.diffusion_model.named_modules()}
        if lost := [key for key in keys if key.rpartition(".")[0] not in made]:
            raise DetectionError(
                f"another pack has put modules of its own into this model's network ({names_text(lost)}), "
                f"which ComfyUI's class {type(self._model.model_config).__name__} does not have. Put the "
                "node that does so behind the quantized model, and load the model again."
            )

    def fill(self, take: Callable, state: dict[str, torch.Tensor], source: str) -> torch.nn.Module:
        """Loads the network's tensors and gives the model away. take(name of a linear layer): its
        QuantizedLayer or None; the entry of a quantized one in `state` only says that it is there.

        Raises IncompleteModel naming what `state` lacks. What the network has no place for is named in the
        log.
        """
        # The model's operations know this frame: it must know neither the model nor the layers afterwards, or
        # they would outlive their use.
        model, self._model, self._take = self._model, None, take
        network = model.diffusion_model
        if not self.network_names:
            stored_as = {id(t): key for key, t in state.items()}
            state = model.model_config.process_unet_state_dict(dict(state))
            layer = lambda key: key.removesuffix(".weight")
            self._renamed = {
                layer(key): layer(stored_as[id(t)])
                for key, t in state.items()
                if id(t) in stored_as and key.endswith(".weight")
            }
        missing, unexpected = network.load_state_dict(state, strict=False)
        if not self.network_names:
            # A checkpoint may leave out buffers, as their module makes them; what was taken from a model has
            # them all, those too that a module leaves empty (positions of SD3).
            buffers = {name for name, _ in network.named_buffers()}
            missing = [key for key in missing if key not in buffers]
        if missing:
            raise IncompleteModel(
                f"{source}: {len(missing)} tensors of the model ({type(model.model_config).__name__}) are "
                f"missing: {names_text(missing)}. The file is not whole: download it or quantize the model "
                "again."
            )
        if unexpected:
            logging.warning(
                f"Nibble: {source}: {len(unexpected)} tensors have no place in the model and are not used: "
                f"{names_text(unexpected)}"
            )
        self._take = None
        return model


def like(patcher: ModelPatcher, prepare: Callable) -> Frame:
    """A model of the same class, config, prediction type, sampling and latent format, with the same tensors
    outside of its network."""
    with bare(patcher) as source:
        origin = origin_of(patcher, (patcher.attachments.get(ATTACHMENT) or {}).get("origin"))
        return Frame(lambda operations: _like(source, origin, operations), origin, True, prepare)


def _like(source, origin, operations):
    config = _config_like(source.model_config, operations)
    kind = source.model_type
    config.model_type = lambda *args, **kwargs: kind  # of the source it must hold nothing: a second model
    if (dtype := config.unet_config.get("dtype")) is not None and dtype.itemsize == 1:
        _set_dtypes(config)
    model = _made(config, origin.beside)
    if type(model) is not type(source):
        raise DetectionError(
            f"ComfyUI's {type(config).__name__} makes a {type(model).__name__}, and this model is a "
            f"{type(source).__name__} of another pack. Quantize the model as ComfyUI's own loaders give it."
        )
    for name, value in vars(source).items():
        if name in vars(model) and not name.startswith("_") and name not in _FRESH:
            setattr(model, name, copy.deepcopy(value))
    for name, child in source.named_children():
        if name != NETWORK:
            model.register_module(name, copy.deepcopy(child).to("cpu"))
    for name, parameter in source.named_parameters(recurse=False):
        model.register_parameter(name, copy.deepcopy(parameter).to("cpu"))
    return model


def of_file(
    origin: Origin, state: dict[str, torch.Tensor], source: str, family: str, prepare: Callable
) -> Frame:
    """By the record in the file, where there is one, else by detection on `state`, header entries and tensors
    beside.

    Raises DetectionError where this ComfyUI has no such class, and where it does not recognise a model
    without a record.
    """
    host = origin.host
    shown = {**state, **origin.beside}
    try:
        found = comfy.model_detection.model_config_from_unet(shown, "", metadata=dict(origin.metadata))
    except Exception as error:  # detection reads whatever it expects of a name
        if not host:
            raise DetectionError(
                f"{source}: ComfyUI's model detection failed ({type(error).__name__}: {error})."
            ) from error
        found = None
    if not host:
        if found is None:
            raise DetectionError(
                f"{source}: this ComfyUI does not recognise the model (family {family}): it is older than "
                "the model, or the file is not whole. Update ComfyUI, or download or quantize the model "
                "again."
            )
        return Frame(lambda operations: _detected(found, shown, operations), origin, False, prepare)
    if found is not None and type(found).__name__ != host["class"]:
        logging.info(
            f"Nibble: {source} is a {host['class']} by its record; from its tensors alone ComfyUI would take "
            f"a {type(found).__name__}"
        )
    return Frame(lambda operations: _recorded(host, origin, operations, source), origin, True, prepare)


def _detected(config, shown, operations):
    """Classes may look at the network's tensors too: Stable Diffusion 2 tells v-prediction by a bias."""
    config.quant_config, config.custom_operations = None, operations
    _set_dtypes(config)
    return _made(config, shown)


def _recorded(host, origin, operations, source):
    classes = {c.__name__: c for c in comfy.supported_models.models}
    try:
        name, unet_config, kind = (
            host["class"],
            host["unet_config"],
            comfy.model_base.ModelType[host["model_type"]],
        )
        settings, latent, outside = host["sampling_settings"], host["latent_format"], host["outside"]
    except KeyError as error:
        raise DetectionError(
            f"{source}: the record of the model lacks or has an unknown {error}. Update ComfyUI."
        ) from error
    if name not in classes:
        raise DetectionError(
            f"{source}: a {name} model, and this ComfyUI has no class of that name. Update ComfyUI."
        )
    config = classes[name](unet_config)
    config.unet_config |= unet_config
    config.sampling_settings |= settings
    config.model_type = lambda *args, **kwargs: kind
    if type(config.latent_format).__name__ != latent:
        if not hasattr(comfy.latent_formats, latent):
            raise DetectionError(
                f"{source}: its latent format is {latent}, which this ComfyUI does not have. Update ComfyUI."
            )
        config.latent_format = getattr(comfy.latent_formats, latent)()
    config.custom_operations = operations
    _set_dtypes(config)
    model = _made(config, origin.beside)
    if type(model).__name__ != host["model"] or model.model_type != kind:
        raise DetectionError(
            f"{source}: a {host['model']} with prediction {kind.name}; this ComfyUI makes a "
            f"{type(model).__name__} with {model.model_type.name} of the class {name}. Update ComfyUI, or "
            "quantize the model again with this one."
        )
    held = outside_tensors(model)
    for key, stored in outside.items():
        if key not in held or held[key].shape != origin.beside[stored].shape:
            raise DetectionError(
                f"{source}: this ComfyUI's {host['model']} has no place for the tensor {key}. Update ComfyUI."
            )
        held[key].copy_(origin.beside[stored])
    return model


def _made(config, state):
    try:
        model = config.get_model(dict(state), "")
    except Exception as error:  # constructors of any kind
        raise DetectionError(
            f"ComfyUI's class {type(config).__name__} could not make the model ({type(error).__name__}: "
            f"{error}). Update ComfyUI, or report this with the name of the model."
        ) from error
    return model


def _config_like(config, operations):
    """A copy of a model_config for other operations. Not by `copy`: ComfyUI's configs answer to every
    attribute, __setstate__ too."""
    made = type(config).__new__(type(config))
    made.__dict__.update(config.__dict__)
    for name in ("unet_config", "sampling_settings", "optimizations"):
        setattr(made, name, copy.deepcopy(getattr(config, name)))
    made.quant_config, made.custom_operations = None, operations
    return made


def _set_dtypes(config):
    """The dtypes that ComfyUI chooses for a bf16 model on this machine; 16 bit where it was told to hold
    weights in fp8, since packed layers have theirs already and norms and embedders are not to lose more."""
    management, supported = comfy.model_management, list(config.supported_inference_dtypes)
    device = management.get_torch_device()
    dtype = management.unet_dtype(supported_dtypes=supported, weight_dtype=torch.bfloat16)
    if dtype.itemsize == 1:
        dtype = next((d for d in (torch.bfloat16, torch.float16) if d in supported), torch.float32)
    cast = management.unet_manual_cast(dtype, device, supported)
    more = {"device": device} if "device" in inspect.signature(config.set_inference_dtype).parameters else {}
    config.set_inference_dtype(dtype, cast, **more)
