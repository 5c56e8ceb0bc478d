"""What a model that we make inherits of what nodes before ours have set on the model it is made of; the rest
is refused by name before any work."""

import inspect
import logging
import types

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS, set_torch_compile_wrapper

from .bare import NETWORK, bare, in_network

EXAMPLES = 3
MULTIGPU = "multigpu"  # ComfyUI's key for clones of a model on further cards
SETTINGS = (str, int, float, bool, type(None), torch.dtype)


class NotInheritable(ValueError):
    """Something on a model that can neither be worked into its weights nor be put onto another model."""

    def __init__(self, what: str, found: list[str], advice: str = "") -> None:
        more = f" and {len(found) - EXAMPLES} more" if len(found) > EXAMPLES else ""
        super().__init__(
            f"this model has {what} on {', '.join(found[:EXAMPLES])}{more}, which act on its own layers: a "
            "model made of it would be without them. Put the node that makes them behind the quantized "
            f"model.{advice}"
        )


def require_inheritable(model: ModelPatcher) -> None:
    """Raises NotInheritable for weight wrappers, and for object patches of the network that
    `inherit_sampling_patches` leaves behind. The log names methods that were changed in the network itself,
    which no patcher knows of."""
    if model.weight_wrapper_patches:
        raise NotInheritable("weight wrappers", list(model.weight_wrapper_patches))
    inherited = {*_settings(model), *_compiled(model)}
    if found := [name for name in model.object_patches if in_network(name) and name not in inherited]:
        raise NotInheritable("object patches", found)
    with bare(model) as shared:
        modules = shared.diffusion_model.named_modules()
        written_over = [name or NETWORK for name, module in modules if "forward" in vars(module)]
    if written_over:
        logging.warning(
            f"Nibble: another pack has written over what {', '.join(written_over[:EXAMPLES])}"
            f"{', ...' * (len(written_over) > EXAMPLES)} of this model's own network computes. A model made "
            "of it is without that: put the node that does so behind the quantized model."
        )


def inherit_sampling_patches(model: ModelPatcher, onto: ModelPatcher) -> None:
    """Puts what sampling nodes have set on a model (ModelSamplingFlux, attention patches, wrappers, models
    that these run, settings of the network) onto the one that is made of it, where it stays in force. The
    network is compiled again where it was compiled as a whole; modules that were compiled one by one are not,
    and the log says so."""
    twin = model.clone()
    onto.model_options = twin.model_options
    outside = {
        name: _rebound(value, model.model, onto.model)
        for name, value in twin.object_patches.items()
        if not in_network(name)
    }
    onto.object_patches = outside | _settings(model)
    onto.wrappers, onto.callbacks, onto.force_cast_weights = (
        twin.wrappers,
        twin.callbacks,
        twin.force_cast_weights,
    )
    onto.attachments = twin.attachments | onto.attachments
    onto.additional_models = {k: held for k, held in twin.additional_models.items() if k != MULTIGPU}
    _compile_again(onto)
    if compiled := _compiled(model):
        logging.warning(
            "Nibble: the quantized model runs without the torch.compile of "
            f"{', '.join(compiled[:EXAMPLES])}{', ...' * (len(compiled) > EXAMPLES)}. Put the node that "
            "compiles behind it."
        )


def uncompiled(model: ModelPatcher) -> ModelPatcher:
    """A clone that computes the same without torch.compile: graphs that are compiled already do not see hooks
    and replaced layers."""
    compiled, held = _compiled(model), model.wrappers.get(WrappersMP.APPLY_MODEL, {})
    if not compiled and COMPILE_KEY not in held:
        return model
    plain = model.clone()
    plain.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    for name in compiled:
        del plain.object_patches[name]
    return plain


def _settings(model) -> dict:
    """Object patches of the network that are plain values, such as FluxKVCache's."""
    return {
        name: value
        for name, value in model.object_patches.items()
        if in_network(name) and isinstance(value, SETTINGS)
    }


def _compiled(model) -> list[str]:
    """Names of object patches of the network that are torch.compile of what they stand for, a module or a
    function."""
    names = [name for name in model.object_patches if in_network(name)]
    with bare(model) as shared:
        return [
            name
            for name in names
            if _compiles(model.object_patches[name], comfy.utils.get_attr(shared, name))
        ]


def _compiles(value, plain) -> bool:
    inner = (
        getattr(value, "_orig_mod", None)
        if isinstance(value, torch.nn.Module)
        else getattr(value, "_torchdynamo_orig_callable", None)
    )
    return inner is not None and (inner is plain or (inspect.ismethod(inner) and inner == plain))


def _rebound(value, model, made):
    """Methods of the model itself, which packs replace, would go on asking the old one."""
    return (
        types.MethodType(value.__func__, made)
        if inspect.ismethod(value) and value.__self__ is model
        else value
    )


def _compile_again(model):
    """TorchCompileModel's wrapper holds on to the network that it was made for."""
    if held := model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(COMPILE_KEY):
        modules = inspect.getclosurevars(held[0]).nonlocals.get("compiled_module_dict", (NETWORK,))
        set_torch_compile_wrapper(model, keys=list(modules), **model.model_options[TORCH_COMPILE_KWARGS])
