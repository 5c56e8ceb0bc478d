"""The `nibble` command."""

import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..precision import report

Base3 = Annotated[
    bool,
    typer.Option(
        "--base3", help="Ternary weights take 1.6 instead of 2 bits in the file; memory stays the same."
    ),
]
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
ablate = typer.Typer(
    no_args_is_help=True, help="Measures what each choice of a method costs and brings on the small FLUX."
)
app.add_typer(ablate, name="ablate")


def _bar(unit):
    from tqdm import tqdm

    return lambda items, total: tqdm(items, total=total, unit=unit, file=sys.stderr, dynamic_ncols=True)


def _note(line):
    typer.echo(line, err=True)


def _device(name):
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


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
def demo(
    out: Annotated[Path, typer.Option(help="Folder for contact_sheet.png and report.json.")] = Path(
        "nibble_demo"
    ),
):
    """Samples the small trained FLUX in full precision and under each method, with mild and hard outliers.
    About 2 minutes."""
    from ..evaluation.demo import run

    report = run.run(out, _bar("step"))
    typer.echo(run.as_text(report))
    typer.echo(f"\n{out / 'contact_sheet.png'}\n{out / 'report.json'}")


@app.command()
def quantize(
    source: Annotated[
        Path, typer.Argument(help="Full-precision safetensors file, or a diffusers `transformer` folder.")
    ],
    destination: Annotated[
        Path, typer.Argument(help="The file to write. Put it into ComfyUI's models/diffusion_models.")
    ],
    method: Annotated[
        str,
        typer.Option(
            help="svdquant_r, svdquant, splitquant, convrot, rtn, robuq, or native: what stock ComfyUI runs."
        ),
    ] = "svdquant_r",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Statistics from Nibble Calibrate or `nibble calibrate`; data-free without."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="SVDQuant and RobuQ: rank of the 16-bit branch; 32 if not given.")
    ] = None,
    gptq: Annotated[
        bool | None, typer.Option(help="SVDQuant and RobuQ: try GPTQ rounding; on if not given.")
    ] = None,
    training: Annotated[
        str,
        typer.Option(
            help="none, standard or best: SplitQuant and RobuQ, then trained against the full-precision "
            "model of a diffusers folder."
        ),
    ] = "none",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another option of the method, as name=value with a JSON value: --set worst=64 --set "
            "transform=affine.",
        ),
    ] = None,
    base3: Base3 = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "auto",
):
    """Quantizes a checkpoint to a Nibble file. A run that was stopped goes on where it was."""
    from ..calibration import Calibration
    from ..formats.nibble import PackFile
    from ..methods import by_name
    from ..run.report import as_text, file_storage
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
        _device(device),
        _bar("layer" if trained == UNTRAINED else "block"),
        base3,
        trained,
        _note,
    )
    written = PackFile(destination)
    typer.echo(
        as_text(
            rows, f"{destination} ({chosen.title})", [file_storage(written)], shapes=written.logical_shapes()
        )
    )
    losses = Path(f"{destination}.losses.json")
    if trained != UNTRAINED and losses.is_file() and find_spec("matplotlib") is not None:
        plot(losses.with_suffix(".png"), losses)
        typer.echo(f"\n{losses.with_suffix('.png')}")


@app.command()
def allocate(
    source: Annotated[
        Path, typer.Argument(help="Full-precision safetensors file, or a diffusers `transformer` folder.")
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            help="The file to write. A table of sensitivities (.json) and a plot (.png) go beside it."
        ),
    ],
    calibration: Annotated[
        Path, typer.Option(help="Statistics from Nibble Calibrate or `nibble calibrate`.")
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="A3: 3 activation bits on average; W2.5: weight bits; 600MB, 6.5GB: the size of the file; "
            "0.8x or 80%: at most this cost by the "
            "speed proxy, 1x with every layer at the menu's most expensive quantized entry (int8 products; "
            "all W4A4 is 0.5x, 16 bit 2x)."
        ),
    ],
    menu: Annotated[
        str,
        typer.Option(
            help="robuq: its activation bits 1, 2, 3, 4 or 8. mixed: robuq, svdquant_r, W8A8 and 16 bit."
        ),
    ] = "robuq",
    gains: Annotated[
        str | None,
        typer.Option(
            help="JSON {layer: factor of its noise}, from `nibble gains`; auto: measure them as that does, "
            "SOURCE being a diffusers folder."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the 16-bit branches.")] = 32,
    gptq: Annotated[bool, typer.Option(help="Try GPTQ rounding.")] = True,
    base3: Base3 = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "auto",
):
    """Gives each layer a precision of its own under a budget, by measured noise, and quantizes. A stopped run
    goes on where it was."""
    from ..calibration import Calibration
    from ..formats.nibble import PackFile
    from ..precision import menu as mixed
    from ..precision import plot as allocate_plot
    from ..precision.allocate import parse_budget
    from ..run.report import as_text, file_storage
    from . import allocate as allocate_file

    asked, config = parse_budget(budget), mixed.MixedConfig(mixed.menu(menu), rank, gptq)
    statistics, device = Calibration(calibration), _device(device)
    if gains == "auto":
        allocate_file.opened(source, destination, statistics)  # refuses before the network runs
        weights = allocate_file.measured_gains(source, statistics, device, _bar("layer"))
    else:
        weights = allocate_file.read_gains(gains) if gains else None
    done, rows = allocate_file.allocate_file(
        source, destination, statistics, asked, config, weights, device, _bar, base3, _note
    )
    typer.echo(report.as_text(done, str(destination)))
    written = PackFile(destination)
    typer.echo(
        "\n"
        + as_text(rows, f"{destination} ({menu})", [file_storage(written)], shapes=written.logical_shapes())
    )
    if find_spec("matplotlib") is None:
        typer.echo("\nNo plot: matplotlib is not installed. pip install 'nibble-quant[demo]' brings it.")
        return
    picture = Path(f"{destination}.png")
    allocate_plot.plot(picture, done)
    typer.echo(f"\n{picture}")


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
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "auto",
):
    """Measures how much of each layer's noise arrives at the end of a sampling. A stopped run goes on where
    it was, a second one is free."""
    from ..calibration import Calibration
    from ..store.atomic import require_output, save_text
    from .allocate import measured_gains

    statistics = Calibration(calibration)
    require_output(out, statistics.files)
    found = measured_gains(source, statistics, _device(device), _bar("layer"), samples)
    save_text(out, json.dumps(found, indent=1) + "\n")
    for name, gain in sorted(found.items(), key=lambda item: -item[1]):
        typer.echo(f"{gain:10.4f}  {name}")


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
    from ..convert.inspect import as_text, describe, verified

    if verify:
        typer.echo(verified(file, _bar("tensor")))
        return
    found = describe(file)
    typer.echo(json.dumps(found, indent=1) if as_json else as_text(found))


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
        typer.echo("\n".join(planned.lines(replacement)))
    lines = conversion.convert(
        planned, destination, lossy=lossy, replacement=replacement, progress=_bar("layer")
    )
    typer.echo("\n".join(lines[-1:] if lossy else lines))


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
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{prompts}: holds no prompts")
    done = calibrate_pipeline(
        pipeline, destination, lines, samples=samples, steps=steps, size=size, seed=seed, memory=int(memory_gb * 2**30),
        device=device, progress=_bar("sample"),
    )  # fmt: skip
    typer.echo(
        f"{destination}: {len(done.names)} inputs of model {done.meta['model']}, calibration {done.hash}"
    )


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
    typer.echo(
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
    from ..run.leftovers import as_text, leftovers

    found = [left for folder in folders or [Path()] for left in leftovers(folder)]
    if not found:
        typer.echo("nothing is left of stopped runs")
        return
    typer.echo(as_text(found))
    size = sum(left.nbytes for left in found if not left.held) / 1e6
    if not remove:
        typer.echo(
            f"{size:,.1f} MB; the same command with --remove removes them. A run with the same options "
            "goes on with them instead."
        )
        return
    for left in found:
        left.remove()
    typer.echo(f"{size:,.1f} MB removed")


@app.command("bench-fit")
def bench_fit(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "auto",
):
    """Times the fit of layers and of a block of FLUX's sizes, and projects it to the whole model. About 3
    minutes on two CPU cores."""
    from ..evaluation import bench_fit as bench
    from ..methods import METHODS

    typer.echo(
        bench.as_text(
            bench.run([METHODS["svdquant"], METHODS["svdquant_r"]], _bar("fit"), json_file, _device(device))
        )
    )


@app.command()
def bench(
    json_file: Annotated[
        Path,
        typer.Option("--json", help="File for the figures; a table (.txt) and a plot (.png) go beside it."),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Three layers of FLUX and a small one, about 3 minutes.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="First time every tile size and keep the fastest for this card.")
    ] = False,
    model: Annotated[
        bool | None,
        typer.Option(
            "--model/--no-model", help="A step of a FLUX-sized model; left out by --quick if not given."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ... or cpu.")] = "auto",
):
    """Checks the kernels and times them against PyTorch and comfy-kitchen. Without a GPU they are only
    checked."""
    import shlex

    from ..evaluation.bench.run import run

    command = shlex.join(["nibble", *sys.argv[1:]])
    code = run(device, json_file, quick=quick, tune=tune, with_model=model, command=command, echo=typer.echo)
    if code:
        raise typer.Exit(code)


@ablate.command("splitquant")
def ablate_splitquant(
    out: Annotated[Path, typer.Option(help="Folder for rows.json, ablation.txt and ablation.png.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="1 and 4 slices with scales of tokens, untrained.")
    ] = False,
    severity: Annotated[float, typer.Option(help="Of the outliers: 1 hard, 0.4 mild, 0 none.")] = 1.0,
):
    """SplitQuant's slices, transforms, scales and training on the small FLUX, hours; a stopped run goes on
    behind its last row."""
    from ..evaluation.ablate import run
    from ..evaluation.ablate.plot import plot
    from ..evaluation.ablate.splitquant import entries
    from ..store.atomic import save_text

    text = run.as_text(rows := run.run(out, entries(quick), severity, _bar("row")))
    save_text(out / "ablation.txt", text + "\n")
    typer.echo(text)
    if find_spec("matplotlib") is not None:
        plot(out / "ablation.png", rows)


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
        if (atomic := sys.modules.get(f"{__package__}.formats.atomic")) is not None:
            atomic.clean_own()
