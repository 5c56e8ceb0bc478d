"""A quantized model with its worst layers raised: what Nibble Guard does."""

import uuid

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.operator.spec import LinearSpec
from ...quant_core.calibration.file import Calibration
from ...quant_core.calibration.observe import measured as as_observed
from ...quant_core.precision.guard_report import Decision, rows_after
from ...quant_core.precision.guarding import Asked, guarded, raise_worst, to_measure
from ...quant_core.run.provenance import origins
from .build import ATTACHMENT, build, frame_like
from .contents import take_apart
from .inherited import inherit_sampling_patches
from .patcher import NibblePatcher
from .progress import logged, shown
from .quantized import make_room
from .source import ModelSource

NAME = "Nibble Guard"


def guarded_model(
    source: ModelSource, quantized: ModelPatcher, calibration: Calibration, asked: Asked
) -> tuple[NibblePatcher, Decision, dict[str, LinearSpec], torch.device]:
    """(a model with what was raised and all that was on `quantized`, the decision, {layer: LinearSpec}, the
    device that was computed on).

    source: of the full-precision model that `quantized` was made from. Raises ValueError where it was not,
    and the errors of `raise_worst`.
    """
    fingerprint = source.fingerprint()
    require_guardable(quantized, fingerprint)
    calibration.require_model(fingerprint)
    device = comfy.model_management.get_torch_device()
    # ComfyUI runs nodes under inference mode, whose tensors no later LoRA or training could touch.
    told = f"{source.family.title}, {asked.text}"
    with logged(NAME, told), torch.inference_mode(False), torch.no_grad():
        contents, frame = take_apart(quantized), frame_like(quantized)
        layers, rest = contents.layers, contents.rest
        plan = to_measure(as_observed(source.layers, calibration), layers)
        make_room(plan, device)
        decision, made, in_16_bit = raise_worst(asked, plan, layers, source, calibration, device, shown)
        layers |= {name: layer for name, layer in made.items() if layer is not None}
        specs = {name: layer.spec for name, layer in layers.items()}
        info = quantized.attachments[ATTACHMENT]
        info = info | {
            "provenance": guarded(info["provenance"], decision, calibration),
            "report": rows_after(info["report"], decision, made),
            "source": f"{info['source']}, raised by {NAME}",
        }
        result = build(lambda name: layers.pop(name, None), specs, rest | in_16_bit, info, frame)
    inherit_sampling_patches(quantized, result)
    result.patches, result.patches_uuid = {k: list(v) for k, v in quantized.patches.items()}, uuid.uuid4()
    return result, decision, specs, device


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
