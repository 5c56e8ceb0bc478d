"""A Trainer on a model as diffusers has it."""

import re
from pathlib import Path

import torch

from ..calibration.file import Calibration
from ..calibration.gains import of_calibration
from ..families import Family, Layer
from ..run.stages import blocks_of
from ..training.presets import Preset
from ..training.trainer import Trainer
from . import model as diffusers_model


def trainer_of(
    model: torch.nn.Module,
    family: Family,
    plan: list[Layer],
    calibration: Calibration,
    device,
    folder: Path,
    preset: Preset,
) -> Trainer:
    """A Trainer of a diffusers model in full precision."""
    names = diffusers_model.modules_of(family, plan, model)
    modules = {}
    for layer, targets in names.items():
        edge = 0
        modules[layer] = []
        for module in map(model.get_submodule, targets):
            modules[layer].append((module, slice(edge, edge + module.out_features)))
            edge += module.out_features
    blocks = [re.match(r"(.+?\.\d+)\.", names[members[0].name][0])[1] for _, members in blocks_of(plan)]
    held = {
        name: [model.get_submodule(block)] for (name, _), block in zip(blocks_of(plan), blocks, strict=True)
    }
    gains = (
        of_calibration(calibration, list(held), lambda: (model, held), device) if preset.adaptive else None
    )
    streams = family.stream_of(family.diffusers_streams)
    return Trainer(model, blocks, modules, calibration.trajectory(), folder, device, streams, gains)
