"""A quantized model with its worst layers raised: what Nibble Guard does."""

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.operator.spec import LinearSpec
from ...quant_core.calibration.file import Calibration
from ...quant_core.calibration.observe import measured as as_observed
from ...quant_core.families.layer import Layer
from ...quant_core.layer.linear import QuantizedLayer
from ...quant_core.layer.precisions import higher, w4a8, w8a8
from ...quant_core.precision.budget import for_memory, for_quality
from ...quant_core.precision.guard import Measured, as_units, by_layer, measure
from ...quant_core.precision.guard_report import Decision, rows_after
from ...quant_core.run.layers import problem_of
from ...quant_core.run.provenance import VERSION
from ...quant_core.run.unfinished import hash_of
from ...quant_core.store.table import Table
from .build import ATTACHMENT, build, frame_like
from .contents import take_apart
from .inherited import inherit_sampling_patches
from .patcher import NibblePatcher
from .progress import steps
from .quantized import make_room
from .source import ModelSource

NAME = "Nibble Guard"
PICK = {"quality": for_quality, "memory": for_memory}


@dataclass(frozen=True)
class Asked:
    """by: "quality", with a limit in dB, or "memory", with one in bytes. blocks: whether the layers of a
    block take one precision. allowed: precisions that a layer may be raised to."""

    by: str
    limit: float
    blocks: bool
    allowed: tuple[str, ...]


def guarded_model(
    source: ModelSource, quantized: ModelPatcher, calibration: Calibration, asked: Asked
) -> tuple[NibblePatcher, Decision, dict[str, LinearSpec], torch.device]:
    """(a model with what was raised and all that was on `quantized`, the decision, {layer: LinearSpec}, the
    device that was computed on).

    source: of the full-precision model that `quantized` was made from. Raises ValueError where it was not,
    and the errors of `precision.guard.measure` and of the budget.
    """
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
        numbers = kept_numbers(plan, layers, source, fingerprint, calibration, asked.allowed, device)
        decision = decided(asked, numbers, len(layers) - len(plan))
        changing = [layer for layer in plan if layer.name in decision.layers]
        made = {}
        for layer in steps(changing, len(changing)):
            precision = decision.layers[layer.name]
            made[layer.name] = make(source, layer, layers.pop(layer.name), precision, rest, device)
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
    return result, decision, specs, device


def decided(asked: Asked, numbers: list[Measured], weight_only: int) -> Decision:
    """What the budget picks. weight_only: how many layers were never asked about."""
    units = as_units(numbers, asked.blocks)
    chosen = PICK[asked.by](units, asked.limit)
    layers = by_layer(numbers, chosen, asked.blocks)
    return Decision(
        asked.by, asked.limit, asked.blocks, asked.allowed, numbers, units, chosen, layers, weight_only
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
    done = {row.name: row for row in table.parsed(Measured.from_json)}
    left = [layer for layer in plan if layer.name not in done]
    for found in steps(measure(left, layers, source, calibration, allowed, device), len(left)):
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
    problem = problem_of(layer, source, None, device)
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
            f"{NAME}: the quantized model has injections ({', '.join(quantized.injections)}), which hold "
            "on to its own layers. "
            f"Put the node that makes them, such as a bypass LoRA loader, behind {NAME}."
        )
    if other := sorted(origins(quantized.attachments[ATTACHMENT]["provenance"]) - {fingerprint}):
        raise ValueError(
            f"{NAME}: the quantized model was made from model {', '.join(other)}, the full-precision model "
            f"is {fingerprint}. "
            "Connect the model that it was quantized from, with the same LoRAs at the same strengths."
        )


def origins(provenance: dict) -> set[str]:
    """Fingerprints of the models that a quantized model comes from; Nibble Swap Blocks joins two of them.
    Other formats than the pack's own name none."""
    found = {provenance["model"]} if provenance.get("model") else set()
    return found.union(*(origins(provenance[side]) for side in ("a", "b") if side in provenance))
