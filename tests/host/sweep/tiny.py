"""Tiny random instances of ComfyUI's model classes, made through the classes themselves and wrapped as
ComfyUI's loader wraps them."""

import math

import torch

from comfyui_nibble.tests.unwritten import filled_with_junk

_UNIT = ("norm", "scale", "gamma")  # names of multiplicative parameters, which start at 1


def make(entry):
    """A ModelPatcher around the entry's class at its narrow widths, in fp32 as ComfyUI loads on a CPU, of
    values that bf16 holds."""
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    config = config_of(entry)
    config.set_inference_dtype(torch.float32, None)
    rand = entry.rand()
    outside = {k: _exact(rand(*shape) / math.sqrt(shape[-1])) for k, shape in entry.outside.items()}
    with filled_with_junk():  # so that `fill` sees what a checkpoint would have brought
        model = config.get_model(outside, "", device="cpu")
    fill(model.diffusion_model, rand, entry.gain)
    with torch.no_grad():
        entry.prepare(model.diffusion_model)
    return ModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )


def config_of(entry, narrow=True):
    """The class, with what it sets itself (`unet_extra_config`) overruled by the narrow widths."""
    import comfy.supported_models

    config = getattr(comfy.supported_models, entry.name)(entry.full | entry.narrow if narrow else entry.full)
    if narrow:
        config.unet_config |= entry.narrow
    return config


def fill(network, rand, gain):
    """Gives every parameter a value: layers of variance gain^2 / K with small biases, norms at 1 and 0,
    tables of variance gain^2, and so do buffers that nobody has written."""
    with torch.no_grad():
        for name, module in network.named_modules():
            for leaf, p in module.named_parameters(recurse=False):
                p.copy_(_exact(_value(f"{name}.{leaf}", leaf, module, p.shape, rand, gain)))
        for buffer in network.buffers():
            if buffer.is_floating_point() and buffer.isnan().any():
                buffer.copy_(_exact(rand(*buffer.shape) * gain))


def _value(name, leaf, module, shape, rand, gain):
    layer = isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
    if leaf == "bias" or leaf.endswith("beta"):
        return 0.01 * rand(*shape) if layer else torch.zeros(shape)
    if layer:
        return rand(*shape) * (gain / math.sqrt(math.prod(shape[1:])))
    if "norm" in type(module).__name__.lower() or (
        len(shape) == 1 and any(word in name.lower() for word in _UNIT)
    ):
        return torch.ones(shape)
    return rand(*shape) * gain if shape else torch.tensor(gain)


def _exact(tensor):
    return tensor.bfloat16().float()
