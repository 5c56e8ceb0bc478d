"""What an allocation of activation bits is worth in pictures: RobuQ's ternary weights on the small FLUX, the
same bits for every layer beside bits by measured noise, with and without the gains of the layers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...calibration.gains import of_calibration
from ...diffusers_host.model import modules_of
from ...families import FLUX
from ...precision.allocate import Allocated, decide, parse_budget, with_choice
from ...precision.measured import Measured
from ...precision.menu import MIXED, MixedConfig
from ...precision.sensitivity import sensitivity
from ...run.layers import quantize_layers
from ...run.source import Tensors
from ...store.progress import Progress, silent
from ...store.table import Table
from ...store.workers import HERE, Workers
from ..demo import tiny_flux
from ..judge import over_seeds
from .run import ROW_BYTES, SEEDS, STEPS, World, pictures_of

CALIBRATIONS = 3
UNIFORM, GAINS, ALONE = "every layer the same", "by noise and gains", "by noise alone"
WAYS = (UNIFORM, GAINS, ALONE)


@dataclass(frozen=True)
class Asked:
    """A row: the way that bits are given out, and activation bits on average. The same for every layer: whole
    bits only."""

    way: str
    bits: float

    @property
    def name(self) -> str:
        return f"{self.bits:g} bits, {self.way}"


def asked(averages: Sequence[float] = (2, 2.5, 3)) -> list[Asked]:
    """All rows, those of one average behind each other."""
    return [Asked(way, bits) for bits in averages for way in WAYS if way != UNIFORM or bits == int(bits)]


def run(
    folder: Path,
    severity: float = 1.0,
    bar: Progress = silent,
    rows: Sequence[Asked] | None = None,
    calibrations: int = CALIBRATIONS,
    config: MixedConfig | None = None,
    captions: Sequence[str] = tiny_flux.MODEL.judged,
    steps: int = STEPS,
    samples: int = 16,
    seeds: Sequence[int] = SEEDS,
    workers: Workers = HERE,
) -> list[dict]:
    """One row for each of `rows` and each of so many calibrations, with the pictures' figures of
    `run.pictures_of`; each is kept in `folder`/rows.json as soon as it is there. workers: who measures
    layers, then rows. Raises ValueError for a damaged rows.json, BudgetError for an average that cannot be
    met."""
    folder, config = Path(folder).absolute(), config or MixedConfig()  # workers are in folders of their own
    settings = {
        "severity": severity,
        "captions": list(captions),
        "steps": steps,
        "samples": samples,
        "seeds": list(seeds),
        "config": asdict(config),
    }
    table = Table(folder / "rows.json", settings, "an ablation of allocations")
    known = dict(table.parsed(lambda r: ((r["calibration"], r["name"]), r)))
    wanted = list(asked() if rows is None else rows)

    def kept(number, chosen, left):  # before an interrupt can come
        told = lambda ask: f"{ask.name}, calibration {number}"
        for ask, found in workers.map(chosen, left, told, lambda ask: ROW_BYTES):
            row = {"calibration": number} | asdict(ask) | {"name": ask.name} | found
            known[number, ask.name] = json.loads(json.dumps(row))
            table.add(known[number, ask.name])
            yield row

    for number in bar(range(calibrations), calibrations):
        left = [ask for ask in wanted if (number, ask.name) not in known]
        if not left:
            continue
        world = World.make(
            folder / f"calibration-{number}", severity, captions, steps, samples, seeds, drawn=number
        )
        chosen = _Choice(world, config, workers)
        for _ in bar(kept(number, chosen, left), len(left)):
            pass
    return [known[number, ask.name] for number in range(calibrations) for ask in wanted]


class _Choice:
    """What one calibration measures and chooses; each layer is fitted once at each precision in each
    process."""

    def __init__(self, world: World, config: MixedConfig, workers: Workers):
        self.world, self.config = world, config
        self.source = Tensors(world.state)
        self.table: list[Measured] = sensitivity(
            world.plan,
            self.source,
            world.calibration,
            config,
            world.folder / "sensitivity.json",
            {"calibration": world.calibration.hash, "config": asdict(config)},
            workers=workers,
        )
        names = modules_of(FLUX, world.plan, world.model)
        layers = [layer.name for layer in with_choice(world.plan)]
        modules = {name: [world.model.get_submodule(t) for t in names[name]] for name in layers}
        self.gains = of_calibration(
            world.calibration, layers, lambda: (world.model, modules), workers=workers, memory=ROW_BYTES
        )
        self.fitted: dict = {}

    def __call__(self, ask: Asked) -> tuple[Asked, dict]:
        """What was asked for, and {"reached": activation bits on average, "layers": {layer: entry}} with the
        figures of pictures."""
        gains = self.gains if ask.way == GAINS else None
        done: Allocated = decide(self.table, parse_budget(f"A{ask.bits:g}"), self.config, gains, 0)
        picked = done.allocation
        if ask.way == UNIFORM:
            picked = done.uniforms[f"robuq A{ask.bits:g}"]
        layers = {}
        for layer in self.world.plan:
            key = layer.name, picked.layers.get(layer.name)
            if key not in self.fitted:
                config = replace(self.config, layers=picked.layers)
                made = quantize_layers([layer], self.source, MIXED, config, self.world.calibration)
                self.fitted[key] = next(iter(made))[0]
            if (quantized := self.fitted[key]) is not None:
                layers[layer.name] = quantized
        figures = pictures_of(self.world.with_layers(layers), self.world)
        return ask, {"reached": picked.reached, "layers": picked.layers} | figures


def allocation_text(rows: list[dict]) -> str:
    """For each average the median picture and what each way brings over the others picture by picture, over
    the pictures of all calibrations, with the standard deviation of its median over the calibrations."""
    of: dict[tuple[float, str], list[dict]] = {}
    for row in rows:
        of.setdefault((row["bits"], row["way"]), []).append(row)
    lines = [f"{'activation bits, way':36}  {'reached':>7}  median picture, by calibration"]
    for (bits, way), mine in of.items():
        medians = " / ".join(f"{row['median_db']:.2f}" for row in mine)
        lines.append(f"{f'{bits:g} bits, {way}':36}  {mine[0]['reached']:7.3f}  {medians} dB")
    lines += ["", "picture by picture; over calibrations: standard deviation of the median"]
    pairs = [(UNIFORM, GAINS), (ALONE, GAINS), (UNIFORM, ALONE)]
    for bits in dict.fromkeys(bits for bits, _ in of):
        for first, second in pairs:
            if (bits, first) in of and (bits, second) in of:
                gain, spread = over_seeds(*(_each(of[bits, way]) for way in (first, second)))
                apart = "" if spread is None else f"; over calibrations {spread:.2f}"
                lines.append(f"{bits:g} bits, {second} over {first}: {gain}{apart}")
    return "\n".join(lines)


def _each(rows):
    """The figures of all pictures, a list a calibration."""
    return [[db for of_seed in row["each_db"] for db in of_seed] for row in rows]
