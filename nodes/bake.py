"""Nibble Bake LoRA."""

import hashlib

import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..quant_core.layer.adapters import bias_correction
from ..quant_core.layer.bake import Baked, bake
from ..quant_core.layer.linear import QuantizedLayer
from .host.adapters import effective, side_of
from .host.bare import PREFIX
from .host.build import build, frame_like
from .host.contents import take_apart
from .host.inherited import inherit_sampling_patches
from .host.patcher import NibblePatcher
from .host.progress import steps
from .host.source import feed

NAME = "Nibble Bake LoRA"

DESCRIPTION = (
    "Writes the LoRAs on a quantized model into its low-rank branches, so that the saved file carries them. "
    "Nothing is quantized again."
)
TOOLTIPS = {
    "model": "A model quantized by Nibble with LoRA loaders behind it.",
    "rank": (
        "0 keeps all of each LoRA and makes the layers larger by its rank. Above 0: at most this rank a "
        "layer, its own included; the report says what is lost. LoKr and full differences need it."
    ),
}
OUTPUT_TOOLTIPS = {
    "model": "A new model with the LoRAs in it, for samplers, further LoRA loaders and Nibble Save Model.",
    "report": "Rank before and after, and the error of each layer. Connect to Preview as Text.",
}


class NibbleBakeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleBakeLora",
            display_name=NAME,
            category="Nibble/files",
            description=DESCRIPTION,
            search_aliases=["lora", "merge", "fold", "fuse", "bake"],
            inputs=[
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                io.Int.Input("rank", default=0, min=0, max=1024, step=8, tooltip=TOOLTIPS["rank"]),
            ],
            outputs=[
                io.Model.Output("model", tooltip=OUTPUT_TOOLTIPS["model"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, rank: int) -> io.NodeOutput:
        if not isinstance(model, NibblePatcher):
            raise ValueError(
                f"{NAME}: the model was not quantized by Nibble. ComfyUI merges LoRAs into full-precision "
                "models when it saves them."
            )
        if not model.patches:
            more = (
                " Bypass loaders leave nothing to bake: use LoraLoaderModelOnly." if model.injections else ""
            )
            raise ValueError(
                f"{NAME}: there is no LoRA on this model. Put a LoRA loader between the quantized model and "
                f"this node.{more}"
            )
        if model.injections:
            raise ValueError(
                f"{NAME}: the model has injections ({', '.join(model.injections)}), such as a bypass LoRA "
                "loader makes, which cannot be read back. Load that LoRA with LoraLoaderModelOnly."
            )
        with torch.inference_mode(False), torch.no_grad():
            contents = take_apart(model)
            device = comfy.model_management.get_torch_device()
            baked, layers = [], dict(contents.layers)
            names = [n for n in layers if _patches(model, f"{n}.weight") or _patches(model, f"{n}.bias")]
            for name in steps(names, len(names)):
                done = _bake(model, layers[name].to(device), rank, device)
                layers[name] = done.layer.to("cpu")
                baked.append(Baked(layers[name], done.before, done.error))
            rest = {k: _merged(model, k, t, device) for k, t in contents.rest.items()}
            merged = [k for k in contents.rest if rest[k] is not contents.rest[k]]
            info = contents.info | {
                "report": _rows(contents.info["report"], baked),
                "provenance": _provenance(model, contents.info, rank),
            }
            specs = {name: layer.spec for name, layer in layers.items()}
            out = build(lambda name: layers.pop(name, None), specs, rest, info, frame_like(model))
        inherit_sampling_patches(model, out)
        return io.NodeOutput(out, report_text(baked, merged, contents.layers, rank))


def _patches(model, key):
    return effective(model.patches.get(PREFIX + key, []))


def _bake(model, layer: QuantizedLayer, rank, device) -> Baked:
    key, bias = f"{PREFIX}{layer.name}", None
    if patches := _patches(model, f"{layer.name}.bias"):
        correction = bias_correction(layer)
        correction = 0.0 if correction is None else correction
        # Patches are for the model's own bias, without what the layer's holds for shifted activations. A new
        # tensor: they write into it.
        bias = (
            comfy.lora.calculate_weight(patches, layer.tensors["bias"].float() + correction, f"{key}.bias")
            - correction
        )
    return bake(layer, side_of(_patches(model, f"{layer.name}.weight"), layer, key, device), rank, bias)


def _merged(model, key, tensor, device):
    """A tensor in 16 bit with its patches in it; itself without any."""
    if not (patches := _patches(model, key)):
        return tensor
    return (
        comfy.lora.calculate_weight(patches, tensor.to(device, torch.float32, copy=True), PREFIX + key)
        .to(tensor.dtype)
        .cpu()
    )


def _provenance(model, info, rank):
    digest = hashlib.sha256()
    feed(digest, model.patches)
    return info["provenance"] | {
        "lora": {"hash": digest.hexdigest()[:16], "rank": rank, "tensors": len(model.patches)}
    }


def _rows(rows, baked):
    done = {b.layer.name: b.layer for b in baked}
    return [
        r | {"what": done[r["name"]].spec.describe(), "nbytes": done[r["name"]].nbytes}
        if r["name"] in done
        else r
        for r in rows
    ]


def report_text(baked: list[Baked], merged: list[str], before: dict[str, QuantizedLayer], rank: int) -> str:
    """Largest error first."""
    grown = sum(b.layer.nbytes - before[b.layer.name].nbytes for b in baked)
    kept = f"at most {rank} columns a layer" if rank else "every column kept"
    lines = [
        f"{NAME}: {len(baked)} quantized layers, {kept}, {grown / 2**20:+.1f} MiB; {len(merged)} tensors in "
        "16 bit merged",
        "error: of the baked weight, in percent of what the LoRAs add to it",
        "",
    ]
    for b in sorted(baked, key=lambda b: -b.error):
        lines.append(f"{100 * b.error:8.3f} %  rank {b.before:3} -> {b.layer.spec.rank:3}  {b.layer.name}")
    return "\n".join(lines)
