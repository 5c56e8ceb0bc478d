"""The `nibble` command."""

import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from . import measure  # noqa: F401
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
    MaybeRank,
    Menu,
    MethodName,
    Quantized,
    Rank,
    Settings,
    Source,
    Training,
)
from .shared import app, bar, device_of, echo, note


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
    method: MethodName = "svdquant_r",
    calibration: MaybeCalibration = None,
    rank: MaybeRank = None,
    gptq: MaybeGptq = None,
    training: Training = "none",
    set_: Settings = None,
    base3: Base3 = False,
    device: Device = "auto",
):
    """Quantizes a checkpoint to a Nibble file. A run that was stopped goes on where it was."""
    from ..calibration import Calibration
    from ..formats.nibble import PackFile
    from ..methods import by_name
    from ..run.report import file_storage, quantization_text
    from ..training.plot import plot
    from ..training.presets import UNTRAINED, preset
    from .quantize import quantize_file

    chosen = by_name(method)
    config = chosen.configured(
        **{k: v for k, v in (("rank", rank), ("gptq", gptq)) if v is not None} | _options(set_ or [])
    )
    statistics = Calibration(calibration) if calibration else None
    trained = preset(method, training)
    rows = quantize_file(
        source,
        destination,
        chosen,
        config,
        statistics,
        device_of(device),
        bar("layer" if trained == UNTRAINED else "block"),
        base3,
        trained,
        note,
    )
    written = PackFile(destination)
    echo(
        quantization_text(
            rows, f"{destination} ({chosen.title})", [file_storage(written)], shapes=written.logical_shapes()
        )
    )
    losses = Path(f"{destination}.losses.json")
    if trained != UNTRAINED and losses.is_file() and find_spec("matplotlib") is not None:
        plot(losses.with_suffix(".png"), losses)
        echo(f"\n{losses.with_suffix('.png')}")


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
):
    """Gives each layer a precision of its own under a budget, by measured noise, and quantizes. A stopped run
    goes on where it was."""
    from ..calibration import Calibration
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
    if gains == "auto":
        allocate_file.opened(source, destination, statistics)  # refuses before the network runs
        weights = allocate_file.measured_gains(source, statistics, device, bar("layer"))
    else:
        weights = allocate_file.read_gains(Path(gains)) if gains else None
    done, rows = allocate_file.allocate_file(
        source, destination, statistics, asked, config, weights, device, bar, base3, note
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
        echo("\nNo plot: matplotlib is not installed. pip install 'nibble-quant[demo]' brings it.")
        return
    allocate_plot.plot(picture, done)
    echo(f"\n{picture}")


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
    found = measured_gains(source, statistics, device_of(device), bar("layer"), samples)
    save_text(out, json.dumps(found, indent=1) + "\n")
    for name, gain in sorted(found.items(), key=lambda item: -item[1]):
        echo(f"{gain:10.4f}  {name}")


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="A quantized model (this pack's, ComfyUI's, comfy-kitchen's, nunchaku's), a full-precision "
            "one, or a calibration."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every tensor with its hash in the file, and say no more."),
    ] = False,
):
    """Says what a file holds, what its layers run on, whether stock ComfyUI loads it and what memory it
    takes."""
    from ..convert.inspect import describe, description_text, verified

    if verify:
        echo(verified(file, bar("tensor")))
        return
    found = describe(file)
    echo(json.dumps(found, indent=1) if as_json else description_text(found))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A quantized model: this pack's, ComfyUI's, comfy-kitchen's or nunchaku's INT4."),
    ],
    destination: Annotated[Path, typer.Argument(help="The file to write.")],
    to: Annotated[str, typer.Option(help="native (stock ComfyUI), kitchen, nunchaku or nibble.")],
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Allow layers that the format does not have to be replaced.")
    ] = False,
    replacement: Annotated[
        str,
        typer.Option(
            help="What they become: int8, '16 bit', or with --comfyui 0.38 awq: weight-only layers in 4 bit "
            "without a low rank."
        ),
    ] = "int8",
    comfyui: Annotated[
        str,
        typer.Option(
            help="Oldest ComfyUI that shall read a native or kitchen file. From 0.38 on modulation stays in "
            "4 bit (awq_w4a16)."
        ),
    ] = "0.31",
):
    """Converts between formats. What that loses is said first, and refused without --lossy; what is not
    replaced is read back and compared."""
    from ..convert import convert as conversion
    from ..formats.detect import open_quantized

    planned = conversion.plan(open_quantized(source), to, comfyui)
    if lossy:
        echo("\n".join(planned.lines(replacement)))
    lines = conversion.convert(
        planned, destination, lossy=lossy, replacement=replacement, progress=bar("layer")
    )
    echo("\n".join(lines[-1:] if lossy else lines))


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
):
    """Gathers statistics with a diffusers pipeline, for `nibble quantize`. In ComfyUI use the node Nibble
    Calibrate."""
    from ..diffusers_host.pipeline import calibrate_pipeline

    lines = None
    if prompts is not None:
        try:
            text = prompts.read_text(encoding="utf-8")
        except ValueError as error:  # bytes that are no text
            raise ValueError(f"{prompts}: not text in UTF-8 ({error})") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{prompts}: holds no prompts")
    done = calibrate_pipeline(
        pipeline,
        destination,
        lines,
        samples=samples,
        steps=steps,
        size=size,
        seed=seed,
        memory=int(memory_gb * 2**30),
        device=device,
        progress=bar("sample"),
        say=note,
    )
    echo(f"{destination}: {len(done.names)} inputs of model {done.meta['model']}, calibration {done.hash}")


@app.command("merge-calibrations")
def merge_calibrations(
    destination: Annotated[Path, typer.Argument(help="Folder for the merged statistics.")],
    calibrations: Annotated[
        list[Path],
        typer.Argument(help="Finished calibrations of one model, made with other prompts or seeds."),
    ],
):
    """Joins calibrations of one model. Recorded inputs of the network, which training needs, are not taken
    along."""
    from ..calibration import Calibration
    from ..calibration.file import merge

    if len(calibrations) < 2:
        raise ValueError(f"one calibration, {calibrations[0]}: expected two or more to merge")
    merge(calibrations, destination)
    done = Calibration(destination)
    echo(
        f"{destination}: {len(done.names)} inputs of model {done.meta['model']}, {done.meta['samples']} "
        f"samples, calibration {done.hash}"
    )


@app.command()
def clean(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Where to look, with all that is below; the current folder if not given."),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what is listed, but for what a running process is at.")
    ] = False,
):
    """Lists what stopped runs have left: finished layers of quantizations that nobody went on with, and files
    that were not written to their end. ComfyUI's lie in output/nibble_calibration."""
    from ..run.leftovers import leftovers, leftovers_text

    found = [left for folder in folders or [Path()] for left in leftovers(folder)]
    if not found:
        echo("nothing is left of stopped runs")
        return
    echo(leftovers_text(found))
    size = sum(left.nbytes for left in found if not left.held) / 1e6
    if not remove:
        echo(
            f"{size:,.1f} MB; the same command with --remove removes them. A run with the same options "
            "goes on with them instead."
        )
        return
    for left in found:
        left.remove()
    echo(f"{size:,.1f} MB removed")


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
