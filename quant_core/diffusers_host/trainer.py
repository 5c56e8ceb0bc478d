"""A Trainer on a model as diffusers has it."""

from pathlib import Path
from typing import cast

import torch

from ..calibration.file import Calibration
from ..families import Family, Layer
from ..training import trainer
from ..training.presets import Preset
from ..training.reconstruct import Modules
from ..training.trainer import Trainer
from .model import block_modules, modules_of


def trainer_of(
    model: torch.nn.Module,
    family: Family,
    plan: list[Layer],
    calibration: Calibration,
    device: str | torch.device,
    folder: Path,
    preset: Preset,
) -> Trainer:
    """`training.trainer.trainer_of` for a diffusers model in full precision, whose layers may be apart
    there."""
    names = modules_of(family, plan, model)
    modules: Modules = {}
    for layer, targets in names.items():
        edge = 0
        modules[layer] = []
        for target in targets:
            module = cast(torch.nn.Linear, model.get_submodule(target))
            modules[layer].append((module, slice(edge, edge + module.out_features)))
            edge += module.out_features
    blocks = block_modules(names, plan)
    streams = family.stream_of(family.diffusers_streams)
    return trainer.trainer_of(model, blocks, modules, streams, calibration, preset, folder, device)
