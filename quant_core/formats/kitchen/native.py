"""The export that stock ComfyUI runs without this pack, through Load Diffusion Model: 0.31 and later, or with
more formats a later one."""

import re
from collections.abc import Callable
from functools import partial

import torch

from ....kernels.operator.spec import LinearSpec
from ...layer.linear import QuantizedLayer
from ..origin import Origin
from . import write as kitchen_out
from .declared import width_is_read

FORMATS = ("convrot_w4a4", "int8_tensorwise", "nvfp4")
# ComfyUI 0.33 has no awq_w4a16; the sources of 0.38.1 do, and name no version that began with it.
OLDEST, AWQ = (
    "0.31",
    "0.38",
)


def has_awq(comfyui: str) -> bool:
    """Whether a ComfyUI of this version reads awq_w4a16. Raises ValueError for what is no version, or one
    without quantized layers."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)(\.\d+)?", comfyui.strip())
    numbers = lambda version: tuple(map(int, version.split(".")))
    if match is None or (found := (int(match[1]), int(match[2]))) < numbers(OLDEST):
        raise ValueError(f"ComfyUI {comfyui}: expected a version from {OLDEST} on, such as 0.33")
    return found >= numbers(AWQ)


def format_of(
    spec: LinearSpec,
    name: str = "",
    layer: Callable[[], QuantizedLayer] | None = None,
    awq: bool = True,
) -> tuple[str, str]:
    """(one of FORMATS or awq_w4a16, ""), or ("", why stock ComfyUI does not run exactly this layer, `name` of
    the model). layer(), awq: as in `write.format_of`, for a ComfyUI that has awq_w4a16."""
    conf, reason = kitchen_out.format_of(spec, layer, awq)
    if conf and conf["format"] not in (*FORMATS, "awq_w4a16"):
        return (
            "",
            f"smoothing, groups or a low rank ({conf['format']}), which ComfyUI's own loader does not read",
        )
    if conf and conf["format"] != "int8_tensorwise" and width_is_read(name):
        return "", "4-bit weights, two a byte, where ComfyUI reads a width of the model off the stored shape"
    return conf.get("format", ""), reason


def losses(
    specs: dict[str, LinearSpec], layer: Callable[[str], QuantizedLayer] | None = None, awq: bool = True
) -> dict[str, str]:
    """{layer: sentence} of the layers that stock ComfyUI does not run as they are: what `replace.replaced` is
    for. layer(name), awq: as in `format_of`."""
    found = {name: format_of(spec, name, layer and partial(layer, name), awq) for name, spec in specs.items()}
    return {name: f"has {reason}" for name, (_, reason) in found.items() if reason}


def save(
    path,
    layers: dict[str, QuantizedLayer],
    rest: dict[str, torch.Tensor],
    metadata: dict,
    origin: Origin | None = None,
    awq: bool = False,
):
    """Writes the file; arguments as in `write.save`. Raises ValueError naming a layer that is not
    native."""
    for name, sentence in losses(
        {name: layer.spec for name, layer in layers.items()}, layers.__getitem__, awq
    ).items():
        raise ValueError(
            f"layer {name} {sentence}. Write it in 8 or 16 bit, or quantize the model with the method native."
        )
    kitchen_out.save(path, layers, rest, metadata, origin, awq)
