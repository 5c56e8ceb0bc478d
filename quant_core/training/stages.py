"""A whole model, block by block: quantized, trained where a preset says so, then runs of blocks; what is finished is kept."""

from collections.abc import Callable, Iterator
from itertools import groupby, pairwise

from ..calibration.file import Calibration
from ..families import Layer
from ..formats.blocks import BlockStore
from ..linear import QuantizedLayer
from ..methods import Method
from ..methods.problem import output_sqnr
from ..quantize import problem_of, quantize_layers
from ..report import Row
from .presets import UNTRAINED, Preset
from .trainer import Trainer


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
    store: BlockStore,
    preset: Preset = UNTRAINED,
    trainer: Trainer | None = None,
) -> Iterator[str]:
    """Quantizes and trains all blocks into `store`; yields after each block and each run of blocks, `steps_of` times in all.

    Arguments as in `quantize_layers`; trainer: None with UNTRAINED. `finished` reads the result. What is in the store is not done again.
    """
    blocks = blocks_of(plan)
    names = [name for name, _ in blocks]
    runs = runs_of(len(blocks), preset.span) if preset.distill else []
    distilled = [_run_name(names, run) for run in runs]
    if preset.blocks:
        trainer.begin(preset.blocks)
    for i, (name, members) in enumerate(blocks):
        if name in store:
            if preset.blocks and any(n not in store for n in names[i:]):
                trainer.skip(i + 1, store.load(name)[0])
            yield name
            continue
        done = list(quantize_layers(members, get, keys, method, config, calibration, device))
        layers, rows = {layer.name: layer for layer, _ in done if layer is not None}, [row for _, row in done]
        if preset.blocks:
            layers = _train(trainer, i + 1, members, layers, rows, name, get, keys, calibration, device)
        store.save(name, layers, rows)
        yield name
    if runs:
        trainer.begin(preset.distill)
    for (first, stop), name in zip(runs, distilled, strict=True):
        if name in store:
            if any(n not in store for n in distilled):
                trainer.skip(stop, store.load(name)[0])
            yield name
            continue
        loaded = [store.load(block) for block in names[first:stop]]
        layers, rows = {k: v for found, _ in loaded for k, v in found.items()}, [row for _, found in loaded for row in found]
        members = [layer for _, group in blocks[first:stop] for layer in group]
        layers = _train(trainer, stop, members, layers, rows, name, get, keys, calibration, device)
        store.save(name, layers, rows)
        yield name


def quantize_on(plan: list[Layer], fit: Callable, store: BlockStore) -> Iterator[tuple[QuantizedLayer | None, Row]]:
    """What `fit(layers of a block)` yields, block by block, from `store` where a run before has left the block there."""
    for name, members in blocks_of(plan):
        if name in store:
            layers, rows = store.load(name)
            # In memory: the file is removed when all is done.
            whole = {n: QuantizedLayer(n, layer.spec, {k: t.clone() for k, t in layer.tensors.items()}) for n, layer in layers.items()}
            yield from ((whole.get(row.name), row) for row in rows)
            continue
        done = []
        for pair in fit(members):
            done.append(pair)
            yield pair
        store.save(name, {layer.name: layer for layer, _ in done if layer is not None}, [row for _, row in done])


def steps_of(plan: list[Layer], preset: Preset) -> int:
    """How often `quantize_blocks` yields."""
    count = len(blocks_of(plan))
    return count + (len(runs_of(count, preset.span)) if preset.distill else 0)


def finished(plan: list[Layer], preset: Preset, store: BlockStore) -> tuple[dict[str, QuantizedLayer], list[Row]]:
    """({layer: quantized}, rows of the report) of a store in which everything is done."""
    names = [name for name, _ in blocks_of(plan)]
    files = [_run_name(names, run) for run in runs_of(len(names), preset.span)] if preset.distill else names
    loaded = [store.load(name) for name in files]
    return {k: v for layers, _ in loaded for k, v in layers.items()}, [row for _, rows in loaded for row in rows]


def _run_name(names, run) -> str:
    first, stop = run[0], min(run[1], len(names))
    return f"distilled-{names[first]}-to-{'prediction' if run[1] > len(names) else names[stop - 1]}"


def _train(trainer, stop, members, layers, rows, name, get: Callable, keys, calibration, device):
    """The layers after training, on the CPU; their rows say what it brought."""
    second_moments = bool({"transform", "smooth"} & set(trainer.config.kinds))  # for GPTQ afterwards
    problems = {m.name: problem_of(m, get, keys, calibration, device, second_moments) for m in members if m.name in layers}
    layers, outcome = trainer.run(stop, problems, {n: layer.to(device) for n, layer in layers.items()}, name)
    for row in rows:
        if row.name in layers and not layers[row.name].spec.weight_only:
            layer = layers[row.name]
            row.sqnr_db, row.nbytes, row.what = output_sqnr(problems[row.name], layer), layer.nbytes, layer.spec.describe()
            row.choices["training" if name == row.block else "distillation"] = outcome.text
    return {n: layer.to("cpu") for n, layer in layers.items()}
