"""A Trainer on a model as diffusers has it."""

import re
from pathlib import Path
from typing import cast

import torch

from ..calibration.file import Calibration
from ..calibration.gains import of_calibration
from ..calibration.trajectory import Trajectory
from ..families import Family, Layer
from ..run.stages import blocks_of
from ..training.presets import Preset
from ..training.reconstruct import Modules
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
    modules: Modules = {}
    for layer, targets in names.items():
        edge = 0
        modules[layer] = []
        for target in targets:
            module = cast(torch.nn.Linear, model.get_submodule(target))
            modules[layer].append((module, slice(edge, edge + module.out_features)))
            edge += module.out_features
    blocks = [_block_of(names[members[0].name][0]) for _, members in blocks_of(plan)]
    held = {
        name: [model.get_submodule(block)] for (name, _), block in zip(blocks_of(plan), blocks, strict=True)
    }
    gains = (
        of_calibration(calibration, list(held), lambda: (model, held), device) if preset.adaptive else None
    )
    streams = family.stream_of(family.diffusers_streams)
    trajectory = cast(Trajectory, calibration.trajectory())  # see `require_trajectory`
    return Trainer(model, blocks, modules, trajectory, folder, device, streams, gains)


def _block_of(module: str) -> str:
    return cast(re.Match, re.match(r"(.+?\.\d+)\.", module))[1]
