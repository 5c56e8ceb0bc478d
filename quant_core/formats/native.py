"""The export that stock ComfyUI (0.33) runs without this pack, through Load Diffusion Model."""

import torch

from ..linear import QuantizedLayer
from ..spec import LinearSpec
from . import kitchen_out
from .kitchen_declared import width_is_read
from .origin import Origin

FORMATS = ("convrot_w4a4", "int8_tensorwise")


def format_of(spec: LinearSpec, name: str = "") -> tuple[str, str]:
    """(one of FORMATS, ""), or ("", why stock ComfyUI does not run exactly this layer, `name` of the model)."""
    conf, reason = kitchen_out.format_of(spec)
    if conf and conf["format"] not in FORMATS:
        return "", f"smoothing, groups or a low rank ({conf['format']}), which ComfyUI's own loader does not read"
    if conf and conf["format"] == "convrot_w4a4" and width_is_read(name):
        return "", "4-bit weights, two a byte, where ComfyUI reads a width of the model off the stored shape"
    return conf.get("format", ""), reason


def losses(specs: dict[str, LinearSpec]) -> dict[str, str]:
    """{layer: sentence} of the layers that stock ComfyUI does not run as they are: what `others.replaced` is for."""
    return {name: f"has {reason}" for name, spec in specs.items() for _, reason in [format_of(spec, name)] if reason}


def save(path, layers: dict[str, QuantizedLayer], rest: dict[str, torch.Tensor], metadata: dict, origin: Origin | None = None):
    """Writes the file; arguments as in `kitchen_out.save`. Raises ValueError naming a layer that is not native."""
    for name, sentence in losses({name: layer.spec for name, layer in layers.items()}).items():
        raise ValueError(f"layer {name} {sentence}. Write it in 8 or 16 bit, or quantize the model with the method native.")
    kitchen_out.save(path, layers, rest, metadata, origin)
