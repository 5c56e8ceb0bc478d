"""What a quantized MODEL has to report: rows, shapes and kernels."""

from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels import paths_of
from ...kernels.operator.spec import LinearSpec
from ...kernels.target import target_of
from ...quant_core.calibration.file import Calibration
from ...quant_core.calibration.observe import measured
from ...quant_core.charts.sheet import Section
from ...quant_core.convert.inspect import BY_MAKER
from ...quant_core.families import by_name
from ...quant_core.layer.row import Row
from ...quant_core.methods import METHODS
from ...quant_core.precision.over_steps import chosen, over_steps, section
from ...quant_core.run.provenance import origins
from ...quant_core.run.unquantized import kept_rows
from .bare import PREFIX, bare
from .build import ATTACHMENT
from .contents import take_apart
from .patcher import NibblePatcher
from .progress import steps
from .quantized import make_room
from .source import ModelSource

NAME = "Nibble Report"


@dataclass(frozen=True)
class Reported:
    """rows: of the report of its quantization, and of all else that is in 16 bit. shapes: {key: shape} as if
    nothing were quantized. paths: {layer: kernel}; lines: on the kernels, for a text."""

    title: str
    rows: list[Row]
    shapes: dict[str, tuple[int, ...]]
    paths: dict[str, str]
    lines: list[str]


def reported(model: ModelPatcher) -> Reported:
    """Raises ValueError for a model that Nibble has not quantized."""
    if not isinstance(model, NibblePatcher):
        raise ValueError(
            f"{NAME}: the model at 'model' was not quantized by Nibble, found {type(model).__name__}. "
            "Connect Nibble Quantize, Nibble Guard or Nibble Load Diffusion Model."
        )
    info = model.attachments[ATTACHMENT]
    family, specs = by_name(info["family"]), specs_of(model)
    shapes = _shapes(model, specs)
    rows = [Row.from_json(row) for row in info["report"]]
    rows += kept_rows(shapes, family, rows, otherwise=BY_MAKER)
    paths, lines = paths_of(specs, target_of(comfy.model_management.get_torch_device()))
    method = info["provenance"].get("method", "")
    method = METHODS[method].title if method in METHODS else method
    return Reported(f"{family.title}, {method}".rstrip(", "), rows, shapes, paths, lines)


def specs_of(model: NibblePatcher) -> dict[str, LinearSpec]:
    """{layer: its LinearSpec as it is stored}, whatever form it runs in."""
    return {
        full.removeprefix(PREFIX): (module.original or module.layer()).spec
        for full, module in model.packed_layers()
    }


def _shapes(model, specs) -> dict[str, tuple[int, ...]]:
    with bare(model) as plain:
        state = plain.diffusion_model.state_dict()
    shapes = {k: tuple(t.shape) for k, t in state.items() if k.rpartition(".")[0] not in specs}
    for name, spec in specs.items():
        shapes[f"{name}.weight"] = tuple(spec.logical_shape)
        if spec.bias:
            shapes[f"{name}.bias"] = (spec.out_features,)
    return shapes


def steps_section(
    found: Reported, model: NibblePatcher, original: ModelPatcher, calibration: Calibration
) -> Section:
    """The curve of errors over the steps, measured on the calibration's held-out tokens.

    Raises ValueError where `model` was not made from `original`, and the errors of `over_steps`.
    """
    source = ModelSource(original)
    fingerprint = source.fingerprint()
    calibration.require_model(fingerprint)
    if others := sorted(origins(model.attachments[ATTACHMENT]["provenance"]) - {fingerprint}):
        raise ValueError(
            f"{NAME}: the model at 'model' was made from model {', '.join(others)}, the one at 'original' is "
            f"{fingerprint}. Connect the model that it was quantized from, with the same LoRAs."
        )
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(False), torch.no_grad():
        layers = take_apart(model).layers
        plan = [
            layer
            for layer in measured(source.layers, calibration)
            if layer.name in layers and not layer.weight_only
        ]
        plan = chosen(plan, found.rows)
        if not plan:
            raise ValueError(f"{NAME}: no layer with quantized inputs is there to measure over the steps.")
        make_room(plan, device)
        work = over_steps(plan, layers, source, calibration, device)
        lines = {layer.name: line for layer, line in steps(work, len(plan)) if line}
    return section(lines, found.rows)
