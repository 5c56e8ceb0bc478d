"""A whole model, block by block: quantized, trained where a preset says so, then runs of blocks; what is
finished is kept."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch

from ..calibration.file import Calibration
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..layer.problem import output_sqnr
from ..layer.row import Row
from ..methods import Method
from ..store.workers import HERE, Workers
from ..training.presets import UNTRAINED, Preset
from ..training.trainer import Trainer
from .layers import fitting_bytes, problem_of, quantize_layers
from .source import Remembered, Weights, rest_of
from .unfinished import Unfinished, hash_of


def blocks_of(plan: list[Layer]) -> list[tuple[str, list[Layer]]]:
    """[(block, its layers)] in the order of the forward pass."""
    return [(name, list(group)) for name, group in groupby(plan, key=lambda layer: layer.block)]


def runs_of(count: int, span: int) -> list[tuple[int, int]]:
    """(first, stop) of runs of `span` of `count` blocks; the last goes to the prediction, count + 1."""
    edges = [*range(0, count, span), count]
    return [(a, b if b < count else count + 1) for a, b in pairwise(edges)]


def quantize_blocks(
    plan: list[Layer],
    source: Weights,
    method: Method,
    config,
    calibration: Calibration | None,
    device,
    store: Unfinished,
    preset: Preset = UNTRAINED,
    trainer: Trainer | None = None,
    workers: Workers = HERE,
) -> Iterator[str]:
    """Quantizes all layers into `store`, and trains them where a preset says so; yields after each layer, or,
    with training, after each block and each run of blocks: `steps_of` times in all.

    Arguments as in `quantize_layers`; trainer: None with UNTRAINED; workers: who fits the layers, with a
    training those of one block at a time; training itself is done here, since what a block is trained on
    comes from the trained blocks before it. `finished` reads the result. What is in the store is not done
    again, unless the weights it was made from have changed since.
    """
    if preset == UNTRAINED:
        unit = OneLayer(source, method, config, calibration, device, store)
        yield from workers.map(unit, plan, lambda layer: layer.name, fitting_bytes)
        return
    one = Fit(source, method, config, calibration, device)
    source = Remembered(source)

    def fit(members):
        found = workers.map(one, members, lambda layer: layer.name, fitting_bytes)
        made = {row.name: (layer, row) for layer, row in found}
        return [made[layer.name] for layer in members]

    def trained(stop, members, layers, rows, name, made_from):
        return _train(trainer, stop, members, layers, rows, name, made_from, source, calibration, device)

    blocks = blocks_of(plan)
    weights = [[source.hash_of(layer.name) for layer in members] for _, members in blocks]
    # A training also goes through what is not quantized.
    rest = hash_of(source.get(key) for key in rest_of(source, (layer.name for layer in plan)))
    sources = list(accumulate(weights, _chained, initial=rest))[1:]
    yield from _block_by_block(blocks, sources, fit, trained, store, preset, trainer)
    if preset.distill:
        yield from _run_by_run(blocks, sources[-1], trained, store, preset, trainer)


def _block_by_block(blocks, sources, fit, trained, store, preset, trainer) -> Iterator[str]:
    """Each block fitted, and trained where the preset has a training of blocks."""
    # Once: each is read whole and compared with its hashes.
    taken = [store.take(name, made_from) for (name, _), made_from in zip(blocks, sources, strict=True)]
    if preset.blocks:
        trainer.begin(preset.blocks)
    for i, (name, members) in enumerate(blocks):
        if taken[i]:
            if preset.blocks and None in taken[i:]:
                trainer.skip(i + 1, taken[i][0])
        else:
            done = fit(members)
            layers = {layer.name: layer for layer, _ in done if layer is not None}
            rows = [row for _, row in done]
            if preset.blocks:
                layers = trained(i + 1, members, layers, rows, name, sources[i])
            store.save(name, sources[i], layers, rows)
        yield name


def _run_by_run(blocks, source, trained, store, preset, trainer) -> Iterator[str]:
    """Runs of finished blocks trained together."""
    names = [name for name, _ in blocks]
    runs = runs_of(len(blocks), preset.span)
    trainer.begin(preset.distill)
    taken = [store.take(_run_name(names, run), source) for run in runs]
    for (first, stop), done in zip(runs, taken, strict=True):
        name = _run_name(names, (first, stop))
        if done:
            if None in taken:
                trainer.skip(stop, done[0])
        else:
            loaded = [store.load(block) for block in names[first:stop]]
            layers = {k: v for found, _ in loaded for k, v in found.items()}
            rows = [row for _, found in loaded for row in found]
            members = [layer for _, group in blocks[first:stop] for layer in group]
            layers = trained(stop, members, layers, rows, name, source)
            store.save(name, source, layers, rows)
        yield name


@dataclass(frozen=True)
class Fit:
    """Fits a layer; gives it, None where it stays in 16 bit, and its row. May be pickled where `source`
    may."""

    source: Weights
    method: Method
    config: object
    calibration: Calibration | None
    device: str | torch.device

    def __call__(self, layer: Layer) -> tuple[QuantizedLayer | None, Row]:
        ((made, row),) = quantize_layers(
            [layer], self.source, self.method, self.config, self.calibration, self.device
        )
        return made, row


@dataclass(frozen=True)
class OneLayer:
    """Fits a layer into the store, unless it is there, made from the same weights; gives its name. May be
    pickled where `source`, a file, may."""

    source: Weights
    method: Method
    config: object
    calibration: Calibration | None
    device: str | torch.device
    store: Unfinished

    def __call__(self, layer: Layer) -> str:
        source = Remembered(self.source)
        made_from = source.hash_of(layer.name)
        if self.store.take(layer.name, made_from) is None:
            made, row = Fit(source, self.method, self.config, self.calibration, self.device)(layer)
            self.store.save(layer.name, made_from, {} if made is None else {layer.name: made}, [row])
        return layer.name


def _chained(before: str, sources: list[str]) -> str:
    """A trained block depends on the blocks before it."""
    return hashlib.sha256("".join([before, *sources]).encode()).hexdigest()[:16]


def steps_of(plan: list[Layer], preset: Preset) -> int:
    """How often `quantize_blocks` yields."""
    if preset == UNTRAINED:
        return len(plan)
    count = len(blocks_of(plan))
    return count + (len(runs_of(count, preset.span)) if preset.distill else 0)


def finished(
    plan: list[Layer], preset: Preset, store: Unfinished
) -> tuple[dict[str, QuantizedLayer], list[Row]]:
    """({layer: quantized, memory-mapped}, rows of the report) of a store in which everything is done."""
    if preset == UNTRAINED:
        units = [layer.name for layer in plan]
    else:
        names = [name for name, _ in blocks_of(plan)]
        units = (
            [_run_name(names, run) for run in runs_of(len(names), preset.span)] if preset.distill else names
        )
    loaded = [store.load(unit) for unit in units]
    return {k: v for layers, _ in loaded for k, v in layers.items()}, [
        row for _, rows in loaded for row in rows
    ]


def _run_name(names, run) -> str:
    first, stop = run[0], min(run[1], len(names))
    return f"distilled-{names[first]}-to-{'prediction' if run[1] > len(names) else names[stop - 1]}"


def _train(trainer, stop, members, layers, rows, name, made_from, source, calibration, device):
    """The layers after training, on the CPU; their rows say what it brought."""
    second_moments = bool({"transform", "smooth"} & set(trainer.config.kinds))  # for GPTQ afterwards
    problems = {
        m.name: problem_of(m, source, calibration, device, second_moments)
        for m in members
        if m.name in layers
    }
    start = {n: layer.to(device) for n, layer in layers.items()}
    layers, outcome = trainer.run(stop, problems, start, name, made_from)
    for row in rows:
        if row.name in layers and not layers[row.name].spec.weight_only:
            layer = layers[row.name]
            row.sqnr_db, row.nbytes, row.what = (
                output_sqnr(problems[row.name], layer),
                layer.nbytes,
                layer.spec.describe(),
            )
            row.choices["training" if name == row.block else "distillation"] = outcome.text
    return {n: layer.to("cpu") for n, layer in layers.items()}
