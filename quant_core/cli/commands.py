"""The `nibble` command."""

import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    Allocated,
    Base3,
    Budget,
    CalibrationFile,
    Device,
    Gains,
    Gptq,
    MaybeCalibration,
    MaybeGptq,
    MaybeGrid,
    MaybeRank,
    Menu,
    MethodName,
    Quantized,
    Rank,
    Ray,
    RayCpus,
    Settings,
    Source,
    Training,
    Wish,
)
from .shared import app, bar, device_of, echo, note, prompts_of, workers_of


def _options(pairs: list[str]) -> dict:
    """{name: value} of "name=value"; what is no JSON is text. Raises ValueError for one without a name or a
    value."""
    out = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--set {pair}: expected name=value")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


@app.command()
def quantize(
    source: Source,
    destination: Quantized,
    method: MethodName = None,
    wish: Wish = None,
    calibration: MaybeCalibration = None,
    rank: MaybeRank = None,
    gptq: MaybeGptq = None,
    grid: MaybeGrid = None,
    training: Training = "none",
    set_: Settings = None,
    base3: Base3 = False,
    device: Device = "auto",
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Quantizes a checkpoint to a Nibble file, by a method or by a wish. A run that was stopped goes on where
    it was."""
    from ..calibration import Calibration
    from ..formats.nibble import PackFile
    from ..methods import by_name
    from ..run.report import file_storage, quantization_text
    from ..training.presets import UNTRAINED, preset
    from .quantize import quantize_file

    if wish is not None:
        given = {"--method": method, "--rank": rank, "--gptq": gptq, "--grid": grid, "--set": set_}
        named = [name for name, value in given.items() if value] + ["--training"] * (training != "none")
        if named:
            raise ValueError(f"--wish {wish} chooses what {named[0]} sets: give one of the two")
        _by_wish(source, destination, wish, calibration, base3, device_of(device), ray, ray_cpus)
        return
    chosen = by_name(method or "svdquant_r")
    given = {"rank": rank, "gptq": gptq, "grid": grid}
    config = chosen.configured(**{k: v for k, v in given.items() if v is not None} | _options(set_ or []))
    statistics = Calibration(calibration) if calibration else None
    trained = preset(chosen.name, training)
    device = device_of(device)
    with workers_of(ray, ray_cpus, device) as workers:
        rows = quantize_file(
            source,
            destination,
            chosen,
            config,
            statistics,
            device,
            bar("layer" if trained == UNTRAINED else "block"),
            base3,
            trained,
            note,
            workers=workers,
        )
    written = PackFile(destination)
    echo(
        quantization_text(
            rows, f"{destination} ({chosen.title})", [file_storage(written)], shapes=written.logical_shapes()
        )
    )
    if trained != UNTRAINED:
        _plot_losses(Path(f"{destination}.losses.json"))


def _plot_losses(losses):
    from ..training.plot import plot

    if losses.is_file() and find_spec("matplotlib") is not None:
        plot(losses.with_suffix(".png"), losses)
        echo(f"\n{losses.with_suffix('.png')}")


def _by_wish(source, destination, wish, calibration, base3, device, ray, ray_cpus):
    from ..calibration import Calibration
    from ..formats.nibble import PackFile
    from ..run.report import file_storage, quantization_text
    from ..run.verdict import verdict
    from .wish import quantize_by_wish

    statistics = Calibration(calibration) if calibration else None
    with workers_of(ray, ray_cpus, device) as workers:
        choice, rows = quantize_by_wish(
            source, destination, wish, statistics, device, bar, base3, note, workers
        )
    written = PackFile(destination)
    title, shapes = f"{destination} ({choice.wish})", written.logical_shapes()
    echo(verdict(rows, shapes).text)
    echo(quantization_text(rows, title, [file_storage(written)], shapes=shapes))


@app.command("quantize-all")
def quantize_all(
    recipes: Annotated[
        Path,
        typer.Argument(
            help="YAML: a list of source, destination and, where wanted, method, wish, calibration, options."
        ),
    ],
    device: Device = "auto",
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Quantizes a list of models, one after the other. A stopped run goes on; what fails is told at the
    end."""
    from .many import quantize_all as run
    from .many import results_text

    device = device_of(device)
    with workers_of(ray, ray_cpus, device) as workers:
        results = run(recipes, device, bar, note, workers)
    echo(results_text(results))
    if any(result.failed for result in results):
        raise typer.Exit(1)


@app.command()
def allocate(
    source: Source,
    destination: Allocated,
    calibration: CalibrationFile,
    budget: Budget,
    menu: Menu = "robuq",
    gains: Gains = None,
    rank: Rank = 32,
    gptq: Gptq = True,
    base3: Base3 = False,
    device: Device = "auto",
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Gives each layer a precision of its own under a budget, by measured noise, and quantizes. A stopped run
    goes on where it was."""
    from ..calibration import Calibration
    from ..charts.sheet import INSTALL
    from ..formats.nibble import PackFile
    from ..precision import menu as mixed
    from ..precision import plot as allocate_plot
    from ..precision import report
    from ..precision.allocate import parse_budget
    from ..run.report import file_storage, quantization_text
    from ..store.atomic import require_output
    from . import allocate as allocate_file

    *_, picture = outputs = allocate_file.outputs_of(destination)
    for out in outputs:
        require_output(out, [] if gains in (None, "auto") else [Path(gains)])
    asked, config = parse_budget(budget), mixed.MixedConfig(mixed.menu(menu), rank, gptq)
    statistics, device = Calibration(calibration), device_of(device)
    weights = None if gains in (None, "auto") else allocate_file.read_gains(Path(gains))
    with workers_of(ray, ray_cpus, device) as workers:
        if gains == "auto":
            allocate_file.opened(source, destination, statistics)  # refuses before the network runs
            weights = allocate_file.measured_gains(source, statistics, device, bar("layer"), workers=workers)
        done, rows = allocate_file.allocate_file(
            source, destination, statistics, asked, config, weights, device, bar, base3, note, workers
        )
    echo(report.allocation_text(done, str(destination)))
    written = PackFile(destination)
    echo(
        "\n"
        + quantization_text(
            rows, f"{destination} ({menu})", [file_storage(written)], shapes=written.logical_shapes()
        )
    )
    if find_spec("matplotlib") is None:
        echo(f"\nNo plot: matplotlib is not installed. {INSTALL} brings it.")
        return
    allocate_plot.plot(picture, done)
    echo(f"\n{picture}")


@app.command()
def guard(
    source: Source,
    quantized: Annotated[
        Path, typer.Argument(help="A Nibble file that was made from SOURCE. It stays as it is.")
    ],
    destination: Quantized,
    calibration: CalibrationFile,
    quality_db: Annotated[
        float | None,
        typer.Option(help="Raise layers below this SQNR; 20 dB is an output 10 % off. 24 if not given."),
    ] = None,
    memory_mb: Annotated[
        float | None, typer.Option(help="Instead: take away as much error as this many MB more allow.")
    ] = None,
    block: Annotated[bool, typer.Option("--block", help="Raise the layers of a block together.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="W4A8, W8A8 or '16 bit'; may be given several times. All if not given."),
    ] = None,
    device: Device = "auto",
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Measures the layers of a quantized model on held-out tokens and puts the worst into more bits. A
    stopped run keeps what it has measured."""
    from ..calibration import Calibration
    from ..layer.precisions import PRECISIONS
    from ..precision.guard_report import guard_text
    from ..precision.guarding import Asked
    from .guard import guard_file

    if quality_db is not None and memory_mb is not None:
        raise ValueError("--quality-db and --memory-mb are both given: give one of the two")
    if unknown := set(allow or ()) - set(PRECISIONS):
        raise ValueError(f"--allow {sorted(unknown)[0]}: choose of {', '.join(PRECISIONS)}")
    by, limit = ("quality", quality_db or 24.0) if memory_mb is None else ("memory", int(memory_mb * 1e6))
    allowed = tuple(p for p in PRECISIONS if p in (allow or PRECISIONS))
    asked = Asked(by, limit, block, allowed)
    device = device_of(device)
    with workers_of(ray, ray_cpus, device) as workers:
        decision = guard_file(
            source, quantized, destination, Calibration(calibration), asked, device, bar, workers
        )
    echo(guard_text(decision, str(destination)))


@app.command()
def gains(
    source: Annotated[
        Path, typer.Argument(help="A diffusers `transformer` folder, the model of the calibration.")
    ],
    calibration: Annotated[
        Path,
        typer.Argument(
            help="Statistics from `nibble calibrate`, which record some inputs of the whole network."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The JSON file to write, for `nibble allocate --gains`.")],
    samples: Annotated[
        int, typer.Option(min=1, help="Recorded samplings to go through for each layer, at 5 of their steps.")
    ] = 2,
    device: Device = "auto",
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Measures how much of each layer's noise arrives at the end of a sampling. A stopped run goes on where
    it was, a second one is free."""
    from ..calibration import Calibration
    from ..calibration.gains import tables_of
    from ..formats.checkpoint import Checkpoint
    from ..store.atomic import require_output, save_text
    from .allocate import measured_gains

    statistics = Calibration(calibration)
    require_output(out, [*Checkpoint(source).inputs, *statistics.files, *tables_of(statistics)])
    device = device_of(device)
    with workers_of(ray, ray_cpus, device) as workers:
        found = measured_gains(source, statistics, device, bar("layer"), samples, workers)
    save_text(out, json.dumps(found, indent=1) + "\n")
    for name, gain in sorted(found.items(), key=lambda item: -item[1]):
        echo(f"{gain:10.4f}  {name}")


@app.command()
def calibrate(
    pipeline: Annotated[
        Path,
        typer.Argument(
            help="A diffusers pipeline folder (with model_index.json) of a model that `nibble inspect` "
            "names a family of."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder for the statistics.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one prompt a line; with DiT one class id or label. Default: the 64 prompts of "
            "the pack, or ids evenly spread."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sampling runs, over the prompts in turn.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps a run.")] = 12,
    size: Annotated[
        int | None, typer.Option(min=16, help="Width and height in pixels; the model's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first run.")] = 0,
    memory_gb: Annotated[float, typer.Option(help="Memory for the statistics of one pass.")] = 4.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "auto",
    shards: Annotated[
        bool,
        typer.Option(
            "--shards",
            help="Four samples at a time, as with --ray, in this process: the same bytes.",
        ),
    ] = False,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Gathers statistics with a diffusers pipeline, for `nibble quantize`. In ComfyUI use the node Nibble
    Calibrate."""
    from ..diffusers_host.pipeline import calibrate_pipeline
    from ..diffusers_host.shards import calibrate_in_shards

    lines = None if prompts is None else prompts_of(prompts)
    asked: dict[str, Any] = {
        "samples": samples,
        "steps": steps,
        "size": size,
        "seed": seed,
        "memory": int(memory_gb * 2**30),
    }
    where: tuple[Any, ...] = (pipeline, destination, lines)
    if shards or ray is not None:
        device = device_of(device)
        with workers_of(ray, ray_cpus, device) as workers:
            options = asked | {"device": device, "progress": bar("task"), "say": note}
            done = calibrate_in_shards(*where, **options, workers=workers)
    else:
        options = asked | {"device": device, "progress": bar("sample"), "say": note}
        done = calibrate_pipeline(*where, **options)
    echo(f"{destination}: {len(done.names)} inputs of model {done.meta['model']}, calibration {done.hash}")


from . import files, measure  # noqa: E402, F401  # here: help lists commands as they are made


def main():
    """Runs the command; known errors are one line on stderr and exit code 1. A polite kill ends it as an
    interrupt does, cleaning up."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        from ...kernels.operator.errors import sentence

        typer.echo(f"nibble: {sentence(str(error), keep=chr(10))}", err=True)
        sys.exit(1)
    finally:
        if (atomic := sys.modules.get(f"{__package__.rpartition('.')[0]}.store.atomic")) is not None:
            atomic.clean_own()
