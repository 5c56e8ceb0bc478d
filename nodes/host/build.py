"""A ComfyUI model around quantized layers: a `Frame` with the layers and the rest in it."""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels import spec_at_load
from ...kernels.operator.spec import LinearSpec
from ...kernels.target import target_of
from ...quant_core.families import by_name
from ...quant_core.formats.detect import open_quantized
from ...quant_core.formats.origin import Origin
from ...quant_core.layer.linear import QuantizedLayer
from ...quant_core.layer.precisions import in_int8
from ...quant_core.run.report import as_report
from .bare import PREFIX, bare, original
from .frame import DetectionError, Frame, like, of_file
from .fused import fuse_gelu
from .origin import ATTACHMENT
from .patcher import NibblePatcher

# Set to 1, every load compares each tensor with its hash: at 10 GB/s from memory, else at the speed of the
# disk, which then reads twice.
VERIFY = "NIBBLE_VERIFY"


def build(
    take: Callable[[str], QuantizedLayer | None],
    specs: dict[str, LinearSpec],
    rest: dict[str, torch.Tensor],
    info: dict,
    frame: Frame,
) -> NibblePatcher:
    """take(name): the QuantizedLayer, called once when its module loads. specs: {name: LinearSpec}. rest:
    {key: tensor}.

    info: {"family", "provenance", "report", "source"}; kept as an attachment that clones share, with the
    frame's origin. Raises IncompleteModel, and DetectionError for a layer that the model has no place for.
    """
    model = frame.fill(take, dict(rest) | placeholders(specs), info["source"])
    fuse_gelu(model)
    offload = comfy.model_management.unet_offload_device()
    patcher = NibblePatcher(model.to(offload), comfy.model_management.get_torch_device(), offload)
    placed = sum(1 for _ in patcher.packed_layers())
    if placed != len(specs):
        raise DetectionError(
            f"{info['source']}: ComfyUI's model has a place for {placed} of {len(specs)} quantized layers"
        )
    patcher.set_attachments(ATTACHMENT, info | {"origin": frame.origin})
    # How ComfyUI makes the model afresh (multi-GPU). From the model itself: keeping its layers aside would
    # hold them twice.
    patcher.cached_patcher_init = (rebuild, (patcher,))
    return patcher


def placeholders(
    specs: dict[str, LinearSpec], dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Meta tensors of the quantized layers' logical shapes, for ComfyUI's detection and its renaming of
    keys."""
    out = {}
    for name, spec in specs.items():
        out[f"{name}.weight"] = torch.empty(spec.logical_shape, dtype=dtype, device="meta")
        if spec.bias:
            out[f"{name}.bias"] = torch.empty(spec.out_features, dtype=dtype, device="meta")
    return out


def frame_like(patcher: ModelPatcher, keys: Iterable[str] = ()) -> Frame:
    """An empty model like a MODEL, quantized or not, for layers as this machine's card wants them. Raises
    DetectionError where ComfyUI cannot make it, or has no place in it for one of the network's tensors
    `keys`."""
    frame = like(patcher, _for_this_card)
    frame.require_modules(keys)
    return frame


def frame_of_file(
    origin: Origin,
    specs: dict[str, LinearSpec],
    rest: dict[str, torch.Tensor],
    source: str | Path,
    family: str,
) -> Frame:
    """An empty model for what is in a file; see `of_file`."""
    return of_file(origin, rest | placeholders(specs), str(source), family, _for_this_card)


def _for_this_card(layer: QuantizedLayer) -> QuantizedLayer:
    device = comfy.model_management.get_torch_device()
    if spec_at_load(layer.spec, target_of(device)) is layer.spec:
        return layer
    return in_int8(layer.to(device)).to("cpu")


def load(path: str | Path, disable_dynamic: bool = True) -> NibblePatcher:
    """A quantized file of any format that `open_quantized` reads, as a model. Weights stay memory-mapped
    until ComfyUI moves them, where the format has the layout of memory. Raises DetectionError where ComfyUI
    has no such model."""
    pack = open_quantized(path)
    if os.environ.get(VERIFY, "0") not in ("", "0"):
        pack.verify()
    for note in pack.notes:
        logging.warning(f"Nibble: {pack.path.name}: {note}")
    if not (family := by_name(pack.family)).comfyui:
        raise DetectionError(
            f"{path}: a {family.title} model, which ComfyUI does not have. It runs in a diffusers pipeline: "
            "see `load` in quant_core/diffusers_host/model.py."
        )
    provenance = pack.provenance or {"method": pack.kind, "source": {"file": pack.path.name}}
    info = {
        "family": pack.family,
        "provenance": provenance,
        "report": pack.report or as_report(pack),
        "source": str(path),
    }
    rest = {key: pack.tensor(key) for key in pack.rest}
    frame = frame_of_file(pack.origin, pack.specs, rest, path, pack.family)
    patcher = build(
        lambda name: pack.sound_layer(name) if name in pack.specs else None, pack.specs, rest, info, frame
    )
    patcher.cached_patcher_init = (load, (path,))
    return patcher


def rebuild(patcher: ModelPatcher, disable_dynamic: bool = True) -> NibblePatcher:
    """A second, independent model with the same layers, on the CPU."""
    layers, rest = unpatched(patcher)
    specs = {name: layer.spec for name, layer in layers.items()}
    return build(
        lambda name: layers.pop(name, None),
        specs,
        rest,
        patcher.attachments[ATTACHMENT],
        frame_like(patcher),
    )


def unpatched(patcher: NibblePatcher) -> tuple[dict[str, QuantizedLayer], dict[str, torch.Tensor]]:
    """({name: QuantizedLayer}, {key: tensor} of the rest) as before any patch, on the CPU.

    A clone shares the modules, and may have wrapped some of them and patched biases and 16-bit weights in
    place.
    """

    plain = lambda key, tensor: original(patcher, PREFIX + key, tensor).detach().cpu()
    layers = {}
    for full, module in patcher.packed_layers():
        layer = module.layer(full.removeprefix(PREFIX))
        tensors = {leaf: plain(f"{layer.name}.{leaf}", t) for leaf, t in layer.tensors.items()}
        layers[layer.name] = module.original or QuantizedLayer(layer.name, layer.spec, tensors)
    with bare(patcher) as model:
        state = model.diffusion_model.state_dict()
    return layers, {k: plain(k, t) for k, t in state.items() if k.rpartition(".")[0] not in layers}
