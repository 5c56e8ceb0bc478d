"""The commands that measure and show the pack: demo, benchmarks, ablations."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .options import Device
from .shared import app, bar, device_of, echo

ablate = typer.Typer(
    no_args_is_help=True, help="Measures what each choice of a method costs and brings on the small FLUX."
)
app.add_typer(ablate, name="ablate")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for contact_sheet.png and report.json.")] = Path(
        "nibble_demo"
    ),
):
    """Samples the small trained FLUX in full precision and under each method, with mild and hard outliers.
    About 2 minutes."""
    from ..evaluation.demo import run

    report = run.run(out, bar("step"))
    echo(run.pictures_text(report))
    echo(f"\n{out / 'contact_sheet.png'}\n{out / 'report.json'}")


@app.command("bench-fit")
def bench_fit(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    device: Device = "auto",
):
    """Times the fit of layers and of a block of FLUX's sizes, and projects it to the whole model. About 3
    minutes on two CPU cores."""
    from ..evaluation import bench_fit as bench
    from ..methods import METHODS

    echo(
        bench.fitting_times_text(
            bench.run([METHODS["svdquant"], METHODS["svdquant_r"]], bar("fit"), json_file, device_of(device))
        )
    )


@app.command()
def bench(
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="File for the figures, with which a second run goes on; a table (.txt) and a plot (.png) go "
            "beside it.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Beyond correctness, the model's step and memory: layers beside comfy-kitchen, fits, "
            "calibration, tuning.",
        ),
    ] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Begin nothing that would end later.")] = 9.0,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ... or cpu.")] = "auto",
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help='Measure nothing: print what the machine code promises on a card, as "RTX 4090" or "A100".',
        ),
    ] = None,
):
    """Checks the kernels, then times the pack against PyTorch, the most important first, each case in a
    process of its own. Without a GPU kernels are checked in Triton's interpreter, and the CPU is timed."""
    import shlex

    if predict is not None:
        from ..evaluation.bench.predict.prediction import run as predicted

        predicted(predict, echo)
        return
    if json_file is None:
        raise typer.BadParameter("--json FILE or --predict CARD")

    from ..evaluation.bench.run import run

    said = shlex.join(["nibble", *sys.argv[1:]])
    if code := run(device, json_file, everything, minutes, echo, said=said):
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

    text = run.ablation_text(rows := run.run(out, entries(quick), severity, bar("row")))
    save_text(out / "ablation.txt", text + "\n")
    echo(text)
    if find_spec("matplotlib") is not None:
        plot(out / "ablation.png", rows)
