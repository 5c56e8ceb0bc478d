"""Measures the rows of an ablation on the small trained FLUX, one after the other; a stopped run goes on
behind the last."""

import copy
import json
import time
from collections.abc import Callable, Iterable
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
from ...families import FLUX, Layer
from ...layer.chunks import power_db
from ...layer.linear import QuantizedLayer
from ...layer.row import Row
from ...run.model import Job, quantized
from ...run.report import sqnr_summary
from ...run.source import Tensors
from ...store.atomic import file_name
from ...store.progress import Progress, silent
from ...store.table import Table
from ..demo import metrics, pictures, tiny_flux
from ..demo.outliers import add_outliers
from ..demo.run import JUDGED, STEPS, calibrate_tiny
from .cost import relative
from .splitquant import Entry, cost_at

BEST = 10  # rows by coherent SQNR that are sampled with at the end, whatever they are
COLUMNS = {
    "layer_db": "layer dB",
    "worst_db": "worst",
    "prediction_db": "prediction",
    "coherent_db": "coherent",
    "latent_db": "latent dB",
    "image_db": "image dB",
    "median_db": "median",
    "cost": "beside",
    "cost_3072": "at 3072",
    "seconds": "s",
}
Bar = Callable[[Iterable, int], Iterable]


@dataclass
class World:
    """The small FLUX with outliers, its calibration, and what it predicts and samples in full precision."""

    folder: Path
    state: dict[str, torch.Tensor]
    model: torch.nn.Module
    plan: list[Layer]
    calibration: Calibration
    trajectory: Trajectory
    held: list[int]
    predictions: dict[int, torch.Tensor]
    latents: torch.Tensor

    @classmethod
    def make(
        cls,
        folder: Path,
        severity: float,
        captions=JUDGED,
        steps: int = STEPS,
        samples: int = 16,
        bar: Progress = silent,
    ):
        """Calibrates into `folder`, or reads what an earlier run has left there."""
        state = add_outliers(load_file(tiny_flux.CHECKPOINT), severity)
        model = tiny_flux.load(state)
        plan = FLUX.layers({k: tuple(v.shape) for k, v in state.items()})
        calibration = calibrate_tiny(
            model,
            plan,
            folder / "calibration",
            samples=samples,
            progress=bar,
            model_hash=f"outliers {severity:g}",
        )
        trajectory = cast(Trajectory, calibration.trajectory())
        held = [i for i, call in enumerate(trajectory.calls) if call.held_out]
        with torch.no_grad():
            predictions = {i: trajectory.run(model, i) for i in held}
        latents = tiny_flux.sample(model, captions, steps, seed=7)
        return cls(folder, state, model, plan, calibration, trajectory, held, predictions, latents)

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
            return trainer_of(self.model, FLUX, self.plan, self.calibration, "cpu", folder, preset)

        with quantized(job, folder, trainer=trainer) as done:
            layers = {name: layer.in_memory() for name, layer in done.layers.items()}
        out, names = copy.deepcopy(self.model), modules_of(FLUX, self.plan, self.model)
        for name, layer in layers.items():
            place(out, names[name], layer)
        return out, done.rows, layers


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


def pictures_of(network, world: World, captions=JUDGED, steps: int = STEPS) -> dict:
    """{"latent_db", "image_db", "median_db"} of samplings against those in full precision; the last of a
    picture, which no single one moves."""
    latents = tiny_flux.sample(network, captions, steps, seed=7)
    want, got = pictures.decode(world.latents), pictures.decode(latents)
    each = [metrics.psnr_db(a, b, 1.0) for a, b in zip(want, got, strict=True)]
    return {
        "latent_db": metrics.latent_psnr_db(world.latents, latents),
        "image_db": metrics.psnr_db(want, got, 1.0),
        "median_db": median(each),
    }


def measure(
    world: World, entry: Entry, captions=JUDGED, steps: int = STEPS, with_pictures: bool | None = None
) -> dict:
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
    row |= {"cost": float(relative([v.spec for v in layers.values()])), "cost_3072": cost_at(entry.method)}
    sampled = entry.pictures if with_pictures is None else with_pictures
    return row | (pictures_of(network, world, captions, steps) if sampled else {})


def run(
    folder: Path,
    entries: list[Entry],
    severity: float = 1.0,
    bar: Progress = silent,
    best: int = BEST,
    captions=JUDGED,
    steps: int = STEPS,
    samples: int = 16,
) -> list[dict]:
    """The rows of `entries`, and pictures of the `best` by coherent SQNR; each is kept in `folder`/rows.json
    as soon as it is measured.

    A row of other settings, also of another default in the meantime, is measured again. Raises ValueError for
    a damaged rows.json.
    """
    folder = Path(folder)
    world = World.make(folder, severity, captions, steps, samples, bar)
    asked = {
        "severity": severity,
        "calibration": world.calibration.hash,
        "captions": list(captions),
        "steps": steps,
    }
    table = Table(folder / "rows.json", asked, "an ablation")
    # The last of a name holds.
    known = dict(table.parsed(lambda r: ((r["name"], json.dumps(r["settings"], sort_keys=True)), r)))
    key = lambda entry: (entry.name, json.dumps(entry.settings, sort_keys=True))

    def add(entry, **options):
        known[key(entry)] = json.loads(json.dumps(measure(world, entry, captions, steps, **options)))
        table.add(known[key(entry)])

    for entry in bar(entries, len(entries)):
        if key(entry) not in known:
            add(entry)
    leading = sorted(entries, key=lambda entry: -known[key(entry)]["coherent_db"])[:best]
    left = [entry for entry in leading if "image_db" not in known[key(entry)]]
    for entry in bar(left, len(left)):
        add(entry, with_pictures=True)
    return [known[key(entry)] for entry in entries]


def ablation_text(rows: list[dict]) -> str:
    """A table, best coherent SQNR first; then the mean of each level of each factor."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'row':{width}}  " + "  ".join(f"{title:>{max(7, len(title))}}" for title in COLUMNS.values())]
    for row in sorted(rows, key=lambda row: -row["coherent_db"]):
        lines.append(
            f"{row['name']:{width}}  "
            + "  ".join(_cell(row.get(k), k).rjust(max(7, len(t))) for k, t in COLUMNS.items())
        )
    lines += [
        "",
        "prediction, coherent: SQNR in dB of the network's prediction on held-out calls, and with the mean "
        "error over a sampling as the noise.",
        "beside: multiply-adds of transform and low rank over those of the layers' products; at 3072: of a "
        "3072 x 3072 layer.",
        "",
    ]
    for factor, levels in by_factor(rows).items():
        means = "  ".join(f"{level}: {mean:.2f} ({count})" for level, (mean, count) in levels.items())
        lines.append(f"mean coherent dB by {factor:9}  {means}")
    return "\n".join(lines)


def _cell(value, key) -> str:
    if value is None:
        return "-"
    return (
        f"{100 * value:.2f}%"
        if key.startswith("cost")
        else f"{value:.0f}"
        if key == "seconds"
        else f"{value:.2f}"
    )


def by_factor(rows: list[dict]) -> dict[str, dict[str, tuple[float, int]]]:
    """{factor: {level: (mean coherent SQNR, rows)}} of the factorial's rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for factor, level in row["levels"].items():
            found.setdefault(factor, {}).setdefault(str(level), []).append(row["coherent_db"])
    return {
        factor: {level: (sum(v) / len(v), len(v)) for level, v in levels.items()}
        for factor, levels in found.items()
    }
