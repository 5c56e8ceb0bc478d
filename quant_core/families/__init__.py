"""Model families: which linear layers are quantized, how, and what the same tensors are called elsewhere."""

from collections.abc import Mapping

from .base import Family, UnknownArchitecture
from .chroma import CHROMA
from .dit import DIT
from .flux import FLUX
from .flux2 import FLUX2
from .generic import GENERIC
from .layer import Layer, Part
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .sdxl import SDXL
from .wan import WAN, WAN_VACE
from .z_image import Z_IMAGE

FAMILIES = (FLUX, FLUX2, CHROMA, PIXART, SD3, QWEN_IMAGE, Z_IMAGE, WAN_VACE, WAN, SDXL, DIT)


def detect(shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """The family of a state dict {key: shape} in ComfyUI's or diffusers' names, without any prefix; `generic`
    where no other knows it.

    Raises UnknownArchitecture, listing what is supported, for a model without repeated blocks of linear
    layers.
    """
    for family in FAMILIES:
        if family.matches(shapes) or family.matches_diffusers(shapes):
            return family
    if GENERIC.matches(shapes):
        return GENERIC
    examples = ", ".join(sorted(shapes)[:3]) or "no tensors"
    raise UnknownArchitecture(
        f"unknown architecture: {len(shapes)} tensors such as {examples}. Supported: "
        f"{', '.join(f.title for f in FAMILIES)}, "
        "with ComfyUI's or diffusers' key names, and any model with repeated blocks of linear layers."
    )


def known(names) -> bool:
    """Whether these names, a set or mapping, are those of a model that the pack has a map of, in ComfyUI's or
    diffusers' spelling."""
    return any(family.matches(names) or family.matches_diffusers(names) for family in FAMILIES)


def by_name(name: str) -> Family:
    """The family called `name`; UnknownArchitecture otherwise."""
    for family in (*FAMILIES, GENERIC):
        if family.name == name:
            return family
    raise UnknownArchitecture(
        f"unknown model family {name!r}. Known to this version: {', '.join(f.name for f in FAMILIES)}."
    )


__all__ = [
    "FAMILIES",
    "GENERIC",
    "Family",
    "Layer",
    "Part",
    "UnknownArchitecture",
    "by_name",
    "detect",
    "known",
]
