"""The commands that measure and show the pack: demo, benchmarks, ablations."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .options import Device
from .shared import app, bar, device_of

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
    typer.echo(run.pictures_text(report))
    typer.echo(f"\n{out / 'contact_sheet.png'}\n{out / 'report.json'}")


@app.command("bench-fit")
def bench_fit(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    device: Device = "auto",
):
    """Times the fit of layers and of a block of FLUX's sizes, and projects it to the whole model. About 3
    minutes on two CPU cores."""
    from ..evaluation import bench_fit as bench
    from ..methods import METHODS

    typer.echo(
        bench.fitting_times_text(
            bench.run([METHODS["svdquant"], METHODS["svdquant_r"]], bar("fit"), json_file, device_of(device))
        )
    )


@app.command()
def bench(
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for the figures; a table (.txt) and a plot (.png) go beside it."),
    ] = None,
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
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help='Measure nothing: print what the machine code promises on a card, as "RTX 4090" or "A100".',
        ),
    ] = None,
):
    """Checks the kernels and times them against PyTorch and comfy-kitchen. Without a GPU they are only
    checked."""
    import shlex

    if predict is not None:
        from ..evaluation.bench.predict.prediction import run as predicted

        predicted(predict, typer.echo)
        return
    if json_file is None:
        raise typer.BadParameter("--json FILE or --predict CARD")

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

    text = run.ablation_text(rows := run.run(out, entries(quick), severity, bar("row")))
    save_text(out / "ablation.txt", text + "\n")
    typer.echo(text)
    if find_spec("matplotlib") is not None:
        plot(out / "ablation.png", rows)
