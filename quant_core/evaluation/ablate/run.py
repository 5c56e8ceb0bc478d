"""Measures the rows of an ablation on a small trained model; a stopped run goes on behind those that it
has."""

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

import torch
from safetensors.torch import load_file

from ...calibration import Calibration
from ...calibration.trajectory import Trajectory
from ...diffusers_host.model import modules_of, place
from ...diffusers_host.trainer import trainer_of
from ...families import Layer
from ...layer.chunks import power_db
from ...layer.linear import QuantizedLayer
from ...layer.row import Row
from ...run.model import Job, quantized
from ...run.report import bits_per_weight, sqnr_summary
from ...run.source import Tensors
from ...store.atomic import file_name
from ...store.progress import Progress, silent
from ...store.table import Table
from ...store.workers import HERE, Workers
from ...training.presets import UNTRAINED
from ..bench_fit import fit_kind
from ..demo import metrics, tiny_flux
from ..demo.model import SmallModel
from ..demo.run import STEPS, calibrate_tiny
from ..inputs import KINDS
from .cost import relative
from .splitquant import Entry, cost_at

BEST = 10  # rows by coherent SQNR that are sampled with at the end, whatever they are
SEEDS = (7, 8)  # of the noise that pictures begin with: each caption once for each
ROW_BYTES = 2**31  # that measuring a row takes at the most
Bar = Callable[[Iterable, int], Iterable]


@dataclass
class World:
    """A small model with outliers, its calibration, and what it predicts and samples in full precision:
    latents (captions, channels, h, w) of each seed."""

    small: SmallModel
    folder: Path
    state: dict[str, torch.Tensor]
    model: torch.nn.Module
    plan: list[Layer]
    calibration: Calibration
    trajectory: Trajectory
    held: list[int]
    predictions: dict[int, torch.Tensor]
    captions: Sequence[str]
    steps: int
    latents: dict[int, torch.Tensor]

    @classmethod
    def make(
        cls,
        folder: Path,
        severity: float,
        captions: Sequence[str] | None = None,
        steps: int = STEPS,
        samples: int = 16,
        seeds: Sequence[int] = SEEDS,
        bar: Progress = silent,
        drawn: int = 0,
        small: SmallModel = tiny_flux.MODEL,
    ):
        """Calibrates into `folder`, or reads what an earlier run has left there. captions: of the pictures,
        those the model is judged by if None; drawn: seed of the captions and of the noise that it calibrates
        on."""
        captions = small.judged if captions is None else captions
        state = small.with_outliers(load_file(small.checkpoint), severity)
        model = small.load(state)
        plan = small.family.layers({k: tuple(v.shape) for k, v in state.items()})
        calibration = calibrate_tiny(
            model,
            plan,
            folder / "calibration",
            samples=samples,
            progress=bar,
            model_hash=f"{small.checkpoint.stem}, outliers {severity:g}",
            seed=drawn,
            small=small,
        )
        trajectory = cast(Trajectory, calibration.trajectory())
        held = [i for i, call in enumerate(trajectory.calls) if call.held_out]
        with torch.no_grad():
            predictions = {i: trajectory.run(model, i) for i in held}
        latents = {seed: small.sample(model, captions, steps, seed) for seed in seeds}
        found = calibration, trajectory, held, predictions
        return cls(small, folder, state, model, plan, *found, captions, steps, latents)

    def quantize(self, entry: Entry) -> tuple[torch.nn.Module, list[Row], dict[str, QuantizedLayer]]:
        """(the model with the entry's layers in place, rows of its report, the layers). Finished blocks of a
        training are kept."""
        settings = {"name": entry.name, "calibration": self.calibration.hash} | entry.settings
        method, preset = entry.method, entry.preset
        folder = self.folder / f"partial-{file_name(json.dumps(settings, sort_keys=True))}"
        job = Job(
            Tensors(self.state), self.plan, method, method.config, self.calibration, settings, preset=preset
        )

        def trainer(folder):
            return trainer_of(
                self.model, self.small.family, self.plan, self.calibration, "cpu", folder, preset
            )

        with quantized(job, folder, trainer=trainer) as done:
            layers = {name: layer.in_memory() for name, layer in done.layers.items()}
        return self.with_layers(layers), done.rows, layers

    def with_layers(self, layers: dict[str, QuantizedLayer]) -> torch.nn.Module:
        """A copy of the model with these in place."""
        out, names = copy.deepcopy(self.model), modules_of(self.small.family, self.plan, self.model)
        for name, layer in layers.items():
            place(out, names[name], layer)
        return out


def prediction_db(
    network: torch.nn.Module, trajectory: Trajectory, want: dict[int, torch.Tensor]
) -> tuple[float, float]:
    """(SQNR, coherent SQNR) in dB of what the network predicts for recorded calls, given {call: what it
    should}.

    Coherent: the noise is the energy of the error's mean over the calls of one sample, the mean over samples;
    the signal is the same in both, the predictions' mean energy. Errors that have nothing in common over n
    calls are 10 log10 n dB better in it.
    """
    signal = noise = 0.0
    means: dict[int, tuple] = {}
    with torch.no_grad():
        for i, reference in want.items():
            error = trajectory.run(network, i).double() - reference.double()
            signal += float(reference.double().square().mean()) / len(want)
            noise += float(error.square().mean()) / len(want)
            total, count = means.get(trajectory.calls[i].sample, (0.0, 0))
            means[trajectory.calls[i].sample] = total + error, count + 1
    coherent = sum(float((total / count).square().mean()) for total, count in means.values()) / len(means)
    return power_db(signal, noise), power_db(signal, coherent)


def pictures_of(network: torch.nn.Module, world: World) -> dict:
    """{"each_db", "ssim", "latent_db", "image_db", "median_db"} of samplings against those in full precision.

    each_db: PSNR of each picture, a list a seed, for `judge.paired`; ssim: structural similarity, the mean;
    image_db, median_db: PSNR of all pictures as one, which a single one can set, and the median one's.
    """
    small = world.small
    latents = {s: small.sample(network, world.captions, world.steps, s) for s in world.latents}
    want, got = ([small.world.decode(x) for x in found.values()] for found in (world.latents, latents))
    each = [
        [metrics.psnr_db(a, b, 1.0) for a, b in zip(*of_seed, strict=True)]
        for of_seed in zip(want, got, strict=True)
    ]
    return {
        "each_db": each,
        "ssim": metrics.ssim(torch.cat(want), torch.cat(got)),
        "latent_db": metrics.latent_psnr_db(
            torch.cat([*world.latents.values()]), torch.cat([*latents.values()])
        ),
        "image_db": metrics.psnr_db(torch.cat(want), torch.cat(got), 1.0),
        "median_db": median(db for of_seed in each for db in of_seed),
    }


def measure(world: World, entry: Entry, with_pictures: bool | None = None) -> dict:
    """The row of an entry."""
    started = time.perf_counter()
    network, rows, layers = world.quantize(entry)
    seconds = time.perf_counter() - started
    summary = sqnr_summary(rows)
    prediction, coherent = prediction_db(network, world.trajectory, world.predictions)
    row = {
        "name": entry.name,
        "settings": entry.settings,
        "levels": dict(entry.levels),
        "layer_db": summary["mean"],
        "worst_db": summary["min"],
    }
    row |= {"prediction_db": prediction, "coherent_db": coherent, "seconds": round(seconds, 1)}
    row["bits"] = bits_per_weight(rows)
    row |= {"cost": float(relative([v.spec for v in layers.values()])), "cost_3072": cost_at(entry.method)}
    sampled = entry.pictures if with_pictures is None else with_pictures
    return row | (pictures_of(network, world) if sampled else {})


@dataclass(frozen=True)
class OneRow:
    """Measures an entry in its world; gives both the entry and its figures. May be pickled, so that a row is
    measured wherever its calibration can be read."""

    world: World
    with_pictures: bool | None = None

    def __call__(self, entry: Entry) -> tuple[Entry, dict]:
        return entry, measure(self.world, entry, self.with_pictures)


def kinds_of(entry: Entry) -> tuple[Entry, dict]:
    """The entry, and the errors of single layers whose inputs are of each of `inputs.KINDS`."""
    return entry, {"kinds": {kind: fit_kind(kind, entry.method)["sqnr_db"] for kind in KINDS}}


def run(
    folder: Path,
    entries: list[Entry],
    severity: float = 1.0,
    bar: Progress = silent,
    best: int = BEST,
    captions: Sequence[str] | None = None,
    steps: int = STEPS,
    samples: int = 16,
    seeds: Sequence[int] = SEEDS,
    kinds: bool = False,
    small: SmallModel = tiny_flux.MODEL,
    workers: Workers = HERE,
) -> list[dict]:
    """The rows of `entries`, and pictures of the `best` by coherent SQNR; each is kept in `folder`/rows.json
    as soon as it is measured. kinds: also, for untrained ones, the errors of layers of `inputs.KINDS`.
    workers: who measures, a row at a time.

    A row of other settings, also of another default in the meantime, is measured again. Raises ValueError for
    a damaged rows.json.
    """
    folder = Path(folder).absolute()  # workers are in folders of their own
    world = World.make(folder, severity, captions, steps, samples, seeds, bar, small=small)
    asked = {
        "severity": severity,
        "calibration": world.calibration.hash,
        "captions": list(world.captions),
        "steps": steps,
        "seeds": list(seeds),
    }
    table = Table(folder / "rows.json", asked, "an ablation")
    # The last of a name holds.
    known = dict(table.parsed(lambda r: ((r["name"], json.dumps(r["settings"], sort_keys=True)), r)))
    key = lambda entry: (entry.name, json.dumps(entry.settings, sort_keys=True))

    def each(unit, left, doing):
        told = lambda entry: f"{doing} {entry.name}"

        def kept():  # before an interrupt can come
            for entry, figures in workers.map(unit, left, told, lambda entry: ROW_BYTES):
                row = known[key(entry)] = json.loads(json.dumps(known.get(key(entry), {}) | figures))
                table.add(row)
                yield row

        for _ in bar(kept(), len(left)):
            pass

    each(OneRow(world), [entry for entry in entries if key(entry) not in known], "measure")
    leading = sorted(entries, key=lambda entry: -known[key(entry)]["coherent_db"])[:best]
    left = [entry for entry in leading if "each_db" not in known[key(entry)]]
    each(OneRow(world, with_pictures=True), left, "sample with")
    alone = [e for e in entries if kinds and e.preset == UNTRAINED and "kinds" not in known[key(e)]]
    each(kinds_of, alone, "layers by themselves of")
    return [known[key(entry)] for entry in entries]
