"""Nibble Guard."""

import hashlib
import json
import uuid
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels import paths_of
from ..kernels.target import target_of
from ..quant_core.calibration.file import Calibration
from ..quant_core.calibration.observe import measured as as_observed
from ..quant_core.families.layer import Layer
from ..quant_core.layer.linear import QuantizedLayer
from ..quant_core.layer.precisions import PRECISIONS, higher, w4a8, w8a8
from ..quant_core.precision.budget import for_memory, for_quality
from ..quant_core.precision.guard import Measured, as_units, by_layer, measure
from ..quant_core.precision.guard_report import Decision, as_text, rows_after
from ..quant_core.run.layers import problem_of
from ..quant_core.run.provenance import VERSION
from ..quant_core.run.unfinished import hash_of
from ..quant_core.store.table import Table
from .host.build import ATTACHMENT, build, frame_like
from .host.contents import take_apart
from .host.inherited import inherit_sampling_patches
from .host.patcher import NibblePatcher
from .host.progress import steps
from .host.quantized import make_room
from .host.source import ModelSource
from .host.types import CalibrationType

NAME = "Nibble Guard"
QUALITY, MEMORY = "quality (dB)", "memory (MiB)"

DESCRIPTION = (
    "Measures each layer of a quantized model on the calibration's held-out tokens and keeps the worst at "
    "W4A8, W8A8 or 16 bit, under a stated quality or memory budget."
)
TOOLTIPS = {
    "model": "The full-precision model that the other one was quantized from, with the same LoRAs.",
    "quantized": (
        "The model to improve, from Nibble Quantize or Nibble Load Diffusion Model. It stays as it is."
    ),
    "calibration": (
        "From Nibble Calibrate on the full-precision model; errors are measured on its held-out tokens."
    ),
    "budget": (
        "quality: raise what is below quality_db, at the least extra memory. memory: take away as much noise "
        "as fits into memory_mib."
    ),
    "quality_db": (
        "For quality: SQNR that each layer, or the mean noise of each block, must reach. 20 dB is an error "
        "of 1 % of the energy."
    ),
    "memory_mib": (
        "For memory: how much larger the model may get. At 0 layers may still become W4A8, which costs speed "
        "on some cards but no memory."
    ),
    "unit": "layer: each on its own. block: the layers of a transformer block change together.",
    "allow_w4a8": (
        "Allow 8-bit activations on the same 4-bit weights. No extra memory; slower on cards with INT4 "
        "tensor cores."
    ),
    "allow_w8a8": (
        "Allow 8-bit weights and activations, without a low rank: 8 bits a weight instead of about 4.5."
    ),
    "allow_16_bit": "Allow the original weight in 16 bit. It has no error, so every quality can be reached.",
}
OUTPUT_TOOLTIPS = {
    "model": "A new model with the raised layers; takes samplers, LoRA loaders and Nibble Save Model.",
    "report": "What was raised and why, and what it costs. Connect to Preview as Text.",
}


class NibbleGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleGuard",
            display_name=NAME,
            category="Nibble",
            description=DESCRIPTION,
            search_aliases=["mixed precision", "sensitivity", "w8a8", "w4a8", "quality", "budget", "repair"],
            inputs=[
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                io.Model.Input("quantized", tooltip=TOOLTIPS["quantized"]),
                CalibrationType.Input("calibration", tooltip=TOOLTIPS["calibration"]),
                io.Combo.Input(
                    "budget", options=[QUALITY, MEMORY], default=QUALITY, tooltip=TOOLTIPS["budget"]
                ),
                io.Float.Input(
                    "quality_db", default=24.0, min=1.0, max=100.0, step=0.5, tooltip=TOOLTIPS["quality_db"]
                ),
                io.Float.Input(
                    "memory_mib",
                    default=256.0,
                    min=0.0,
                    max=1048576.0,
                    step=16.0,
                    tooltip=TOOLTIPS["memory_mib"],
                ),
                io.Combo.Input("unit", options=["layer", "block"], default="layer", tooltip=TOOLTIPS["unit"]),
                io.Boolean.Input("allow_w4a8", default=True, tooltip=TOOLTIPS["allow_w4a8"]),
                io.Boolean.Input("allow_w8a8", default=True, tooltip=TOOLTIPS["allow_w8a8"]),
                io.Boolean.Input("allow_16_bit", default=True, tooltip=TOOLTIPS["allow_16_bit"]),
            ],
            outputs=[
                io.Model.Output("model", tooltip=OUTPUT_TOOLTIPS["model"]),
                io.String.Output("report", tooltip=OUTPUT_TOOLTIPS["report"]),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        quantized: ModelPatcher,
        calibration: Calibration,
        budget: str,
        quality_db: float,
        memory_mib: float,
        unit: str,
        allow_w4a8: bool,
        allow_w8a8: bool,
        allow_16_bit: bool,
    ) -> io.NodeOutput:
        allowed = tuple(
            p for p, wanted in zip(PRECISIONS, (allow_w4a8, allow_w8a8, allow_16_bit), strict=True) if wanted
        )
        if not allowed:
            raise ValueError(
                f"{NAME}: no precision is allowed. Switch on at least one of W4A8, W8A8 and 16 bit."
            )
        by, limit = ("quality", quality_db) if budget == QUALITY else ("memory", int(memory_mib * 2**20))
        pick = for_quality if by == "quality" else for_memory
        pick((), limit)  # refuses a budget that means nothing before the work is done
        source = ModelSource(model)
        fingerprint = source.fingerprint()
        require_guardable(quantized, fingerprint)
        calibration.require_model(fingerprint)
        device = comfy.model_management.get_torch_device()
        # ComfyUI runs nodes under inference mode, whose tensors no later LoRA or training could touch.
        with torch.inference_mode(False), torch.no_grad():
            contents, frame = take_apart(quantized), frame_like(quantized)
            layers, rest = contents.layers, contents.rest
            plan = [
                layer
                for layer in as_observed(source.layers, calibration)
                if layer.name in layers and higher(layers[layer.name].spec)
            ]
            make_room(plan, device)
            # Two passes: numbers of all candidates, then only the chosen ones; the candidates of a 12B model
            # would fill 18 GB.
            measured = kept_numbers(plan, layers, source, fingerprint, calibration, allowed, device)
            units = as_units(measured, blocks := unit == "block")
            chosen = pick(units, limit)
            weight_only = len(layers) - len(plan)
            decision = Decision(
                by,
                limit,
                blocks,
                allowed,
                measured,
                units,
                chosen,
                by_layer(measured, chosen, blocks),
                weight_only,
            )
            changing = [layer for layer in plan if layer.name in decision.layers]
            made = {}
            for layer in steps(changing, len(changing)):
                made[layer.name] = make(
                    source, layer, layers.pop(layer.name), decision.layers[layer.name], rest, device
                )
            layers |= {name: layer for name, layer in made.items() if layer is not None}
            specs = {name: layer.spec for name, layer in layers.items()}
            info = quantized.attachments[ATTACHMENT]
            info = info | {
                "provenance": guarded(info["provenance"], decision, calibration),
                "report": rows_after(info["report"], decision, plan, made),
                "source": f"{info['source']}, raised by {NAME}",
            }
            result = build(lambda name: layers.pop(name, None), specs, rest, info, frame)
        inherit_sampling_patches(quantized, result)
        result.patches, result.patches_uuid = {k: list(v) for k, v in quantized.patches.items()}, uuid.uuid4()
        _, lines = paths_of(specs, target_of(device))
        return io.NodeOutput(
            result, "\n".join([as_text(decision, f"{source.family.title}, {NAME}"), "", *lines])
        )


def kept_numbers(
    plan: list[Layer],
    layers: dict[str, QuantizedLayer],
    source: ModelSource,
    fingerprint: str,
    calibration: Calibration,
    allowed: tuple[str, ...],
    device: torch.device | str,
) -> list[Measured]:
    """Of `measure`, in the order of `plan`. Beside the calibration they stay for a run that goes on, and for
    another budget."""
    settings = {"model": fingerprint, "calibration": calibration.hash, "allowed": allowed, "nibble": VERSION}
    settings["quantized"] = hash_of(t for layer in plan for t in layers[layer.name].tensors.values())
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    table = Table(Path(f"{calibration.path}.{key}.guard.json"), settings, "measured layers")
    done = {row.name: row for row in table.parsed(lambda row: Measured(**row))}
    left = [layer for layer in plan if layer.name not in done]
    for found in steps(
        measure(left, layers, source.get, source.shapes, calibration, allowed, device), len(left)
    ):
        done[found.name] = found
        table.add(asdict(found))
    return [done[layer.name] for layer in plan]


def make(
    source: ModelSource,
    layer: Layer,
    quantized: QuantizedLayer,
    precision: str,
    rest: dict[str, torch.Tensor],
    device: torch.device | str,
) -> QuantizedLayer | None:
    """The layer at a precision, on the CPU; None at 16 bit, where its original tensors go to `rest`."""
    if precision == "W4A8":  # the same tensors: nothing to load, nothing to copy
        return w4a8(quantized)
    problem = problem_of(layer, source.get, source.shapes, None, device)
    if precision == "W8A8":
        return w8a8(problem, quantized.to(device)).to("cpu")
    tensors = {"weight": problem.original.reshape(quantized.spec.logical_shape)} | (
        {} if problem.bias is None else {"bias": problem.bias}
    )
    # In 16 bit also where ComfyUI holds the source in fp32, as on a CPU.
    rest |= {f"{layer.name}.{leaf}": t.to("cpu", problem.dtype, copy=True) for leaf, t in tensors.items()}
    return None


def guarded(provenance: dict, decision: Decision, calibration: Calibration) -> dict:
    """The provenance of a quantized model with what Guard did; a second Guard adds to the list."""
    entry = {
        "budget": decision.by,
        "limit": decision.limit,
        "unit": "block" if decision.blocks else "layer",
        "precisions": list(decision.allowed),
        "calibration": calibration.hash,
        "raised": decision.layers,
        "nibble": VERSION,
    }
    return provenance | {"guard": [*provenance.get("guard", ()), entry]}


def require_guardable(quantized: ModelPatcher, fingerprint: str) -> None:
    """Raises ValueError where `quantized` is not a Nibble model made from the model of this fingerprint, or
    has injections."""
    if not isinstance(quantized, NibblePatcher):
        raise ValueError(
            f"{NAME}: the model at 'quantized' was not quantized by Nibble. Connect the output of Nibble "
            "Quantize or Nibble Load Diffusion Model."
        )
    if quantized.injections:
        raise ValueError(
            f"{NAME}: the quantized model has injections ({', '.join(quantized.injections)}), which hold on "
            f"to its own layers. Put the node that makes them, such as a bypass LoRA loader, behind {NAME}."
        )
    if other := sorted(origins(quantized.attachments[ATTACHMENT]["provenance"]) - {fingerprint}):
        raise ValueError(
            f"{NAME}: the quantized model was made from model {', '.join(other)}, the full-precision model "
            f"is {fingerprint}. Connect the model that it was quantized from, with the same LoRAs at the "
            "same strengths."
        )


def origins(provenance: dict) -> set[str]:
    """Fingerprints of the models that a quantized model comes from; Nibble Swap Blocks joins two of them.
    Other formats than the pack's own name none."""
    found = {provenance["model"]} if provenance.get("model") else set()
    return found.union(*(origins(provenance[side]) for side in ("a", "b") if side in provenance))
