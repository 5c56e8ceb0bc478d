"""A whole model, block by block: quantized, trained where a preset says so, then runs of blocks; what is
finished is kept."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import accumulate, groupby, pairwise

from ..calibration.file import Calibration
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..layer.problem import output_sqnr
from ..layer.row import Row
from ..methods import Method
from ..training.presets import UNTRAINED, Preset
from ..training.trainer import Trainer
from .layers import problem_of, quantize_layers
from .unfinished import Remembered, Unfinished


def blocks_of(plan: list[Layer]) -> list[tuple[str, list[Layer]]]:
    """[(block, its layers)] in the order of the forward pass."""
    return [(name, list(group)) for name, group in groupby(plan, key=lambda layer: layer.block)]


def runs_of(count: int, span: int) -> list[tuple[int, int]]:
    """(first, stop) of runs of `span` of `count` blocks; the last goes to the prediction, count + 1."""
    edges = [*range(0, count, span), count]
    return [(a, b if b < count else count + 1) for a, b in pairwise(edges)]


def quantize_blocks(
    plan: list[Layer],
    get,
    keys,
    method: Method,
    config,
    calibration: Calibration | None,
    device,
    store: Unfinished,
    preset: Preset = UNTRAINED,
    trainer: Trainer | None = None,
) -> Iterator[str]:
    """Quantizes all layers into `store`, and trains them where a preset says so; yields after each layer, or,
    with training, after each block and each run of blocks: `steps_of` times in all.

    Arguments as in `quantize_layers`; trainer: None with UNTRAINED. `finished` reads the result. What is in
    the store is not done again, unless the weights it was made from have changed since.
    """
    get = Remembered(get, keys)
    fit = lambda members: list(quantize_layers(members, get, keys, method, config, calibration, device))
    if preset == UNTRAINED:
        yield from _layer_by_layer(plan, fit, store, get)
        return
    blocks = blocks_of(plan)
    names = [name for name, _ in blocks]
    sources = list(
        accumulate(([get.source_of(m.name) for m in members] for _, members in blocks), _chained, initial="")
    )[1:]
    runs = runs_of(len(blocks), preset.span) if preset.distill else []
    distilled = [_run_name(names, run) for run in runs]
    # Once: each is read whole and compared with its hashes.
    taken = [store.take(*unit) for unit in zip(names, sources, strict=True)]
    if preset.blocks:
        trainer.begin(preset.blocks)
    for i, (name, members) in enumerate(blocks):
        if taken[i]:
            if preset.blocks and None in taken[i:]:
                trainer.skip(i + 1, taken[i][0])
            yield name
            continue
        done = fit(members)
        layers, rows = {layer.name: layer for layer, _ in done if layer is not None}, [row for _, row in done]
        if preset.blocks:
            layers = _train(trainer, i + 1, members, layers, rows, name, get, keys, calibration, device)
        store.save(name, sources[i], layers, rows)
        yield name
    if runs:
        trainer.begin(preset.distill)
    taken = [store.take(name, sources[-1]) for name in distilled]
    for (first, stop), name, done in zip(runs, distilled, taken, strict=True):
        if done:
            if None in taken:
                trainer.skip(stop, done[0])
            yield name
            continue
        loaded = [store.load(block) for block in names[first:stop]]
        layers, rows = (
            {k: v for found, _ in loaded for k, v in found.items()},
            [row for _, found in loaded for row in found],
        )
        members = [layer for _, group in blocks[first:stop] for layer in group]
        layers = _train(trainer, stop, members, layers, rows, name, get, keys, calibration, device)
        store.save(name, sources[-1], layers, rows)
        yield name


def _layer_by_layer(plan, fit, store, get) -> Iterator[str]:
    for layer in plan:
        source = get.source_of(layer.name)
        if store.take(layer.name, source) is None:
            ((made, row),) = fit([layer])
            store.save(layer.name, source, {} if made is None else {layer.name: made}, [row])
        yield layer.name


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


def _train(trainer, stop, members, layers, rows, name, get: Callable, keys, calibration, device):
    """The layers after training, on the CPU; their rows say what it brought."""
    second_moments = bool({"transform", "smooth"} & set(trainer.config.kinds))  # for GPTQ afterwards
    problems = {
        m.name: problem_of(m, get, keys, calibration, device, second_moments)
        for m in members
        if m.name in layers
    }
    layers, outcome = trainer.run(stop, problems, {n: layer.to(device) for n, layer in layers.items()}, name)
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
