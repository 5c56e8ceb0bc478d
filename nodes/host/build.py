"""A ComfyUI model around quantized layers, through ComfyUI's own model detection on logical shapes."""

import comfy.sd
import comfy.utils
import torch

from ...quant_core.formats.pack import PackFile
from .operations import operations_for
from .patcher import NibblePatcher

ATTACHMENT = "nibble"


class DetectionError(RuntimeError):
    """ComfyUI does not know the model in the file."""


def build(layers, specs, rest, info, dtype=torch.bfloat16, disable_dynamic=True) -> NibblePatcher:
    """layers: mapping of name -> QuantizedLayer, read when its module loads. specs: {name: LinearSpec}. rest: {key: tensor}.

    info: {"family", "provenance", "report", "source"}; kept as an attachment that clones share. The quantized weights are
    shown to the detection as meta tensors of their logical shape in `dtype`.
    """
    state_dict = dict(rest)
    for name, spec in specs.items():
        state_dict[f"{name}.weight"] = torch.empty(spec.out_features, spec.in_features, dtype=dtype, device="meta")
        if spec.bias:
            state_dict[f"{name}.bias"] = torch.empty(spec.out_features, dtype=dtype, device="meta")
    options = {"custom_operations": operations_for(layers)}
    plain = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options, disable_dynamic=True)
    if plain is None:
        raise DetectionError(f"{info['source']}: this ComfyUI does not recognise the model (family {info['family']}). Update ComfyUI.")
    patcher = NibblePatcher(plain.model, plain.load_device, plain.offload_device)
    if missing := set(specs) - {n.removeprefix("diffusion_model.") for n, _ in patcher.packed_layers()}:
        raise DetectionError(f"{info['source']}: ComfyUI's model has no place for the quantized layers {sorted(missing)[:3]}")
    patcher.set_attachments(ATTACHMENT, info)
    # Called with disable_dynamic by ComfyUI when it needs the model afresh (multi-GPU, compile).
    patcher.cached_patcher_init = (build, (layers, specs, rest, info, dtype))
    return patcher


class _LazyLayers:
    """A PackFile as the mapping that `build` takes."""

    def __init__(self, pack):
        self.pack = pack

    def get(self, name):
        return self.pack.layer(name) if name in self.pack.specs else None


def load(path, disable_dynamic=True) -> NibblePatcher:
    """A Nibble file as a model. Weights stay memory-mapped until ComfyUI moves them."""
    pack = PackFile(path)
    info = {"family": pack.family, "provenance": pack.provenance, "report": pack.report, "source": str(path)}
    rest = {key: pack.tensor(key) for key in pack.rest}
    patcher = build(_LazyLayers(pack), pack.specs, rest, info)
    patcher.cached_patcher_init = (load, (path,))
    return patcher
