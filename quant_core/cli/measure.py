"""The commands that measure and show the pack: demo, benchmarks, ablations."""

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .options import CalibrationFile, Device, Ray, RayCpus
from .shared import app, bar, device_of, echo, note, prompts_of, workers_of

ablate = typer.Typer(
    no_args_is_help=True, help="Measures what each choice of a method costs and brings on a small model."
)
app.add_typer(ablate, name="ablate")


SmallModelName = Annotated[
    str, typer.Option("--model", help="landscapes or shapes, each a small FLUX, or shields, a small PixArt.")
]


def _small(name):
    from ..evaluation.demo.run import MODELS

    if name not in MODELS:
        raise typer.BadParameter(f"expected {', '.join(MODELS)}, found {name}", param_hint="--model")
    return MODELS[name]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for contact_sheet.png and report.json.")] = Path(
        "nibble_demo"
    ),
    model: SmallModelName = "landscapes",
    wishes: Annotated[
        bool,
        typer.Option("--wishes", help="In place of methods what each wish makes, in bytes, seconds and dB."),
    ] = False,
):
    """Samples a small model in full precision and under each method, with mild and hard outliers. About 5
    minutes on two CPU cores."""
    from ..evaluation.demo import run
    from .wishes import measure_wishes, wishes_text

    small = _small(model)
    if wishes:
        echo(wishes_text(measure_wishes(small, bar)))
        return
    report = run.run(out, bar("step"), model)
    echo(f"{report['model']}\n\n{run.pictures_text(report)}")
    echo(f"\n{out / 'contact_sheet.png'}\n{out / 'report.json'}")


@app.command()
def judge(
    pipeline: Annotated[Path, typer.Argument(help="A diffusers pipeline folder (with model_index.json).")],
    out: Annotated[Path, typer.Argument(help="Folder for files, pictures, judge.json and judge.png.")],
    calibration: CalibrationFile,
    methods: Annotated[
        str, typer.Option(help="Names with commas between; the others are compared with the first.")
    ] = "svdquant_r,svdquant,convrot",
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line; 16 of the pack's own if not given.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a sampling.")] = 20,
    size: Annotated[
        int | None, typer.Option(min=16, help="Width and height in pixels; the model's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next number for each one more.")] = 1000,
    device: Device = "auto",
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Compares methods on a model and prompts of your own: pictures of each against full precision, medians
    with intervals, a contact sheet. A stopped run goes on."""
    from ..calibration import Calibration
    from ..calibration.prompts import default_prompts
    from .judge import judge_pipeline

    device, names = device_of(device), [name.strip() for name in methods.split(",") if name.strip()]
    lines = default_prompts()[:16] if prompts is None else prompts_of(prompts)
    with workers_of(ray, ray_cpus, device) as workers:
        text = judge_pipeline(
            pipeline,
            out,
            names,
            Calibration(calibration),
            lines,
            steps=steps,
            size=size,
            seed=seed,
            device=device,
            progress=bar,
            say=note,
            workers=workers,
        )
    echo(f"{text}\n\n{out / 'judge.png'}\n{out / 'judge.json'}")


@app.command("bench-fit")
def bench_fit(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    device: Device = "auto",
    kinds: Annotated[
        bool, typer.Option(help="Not times, but the error of layers with inputs of eight kinds, by method.")
    ] = False,
):
    """Times the fit of layers and of a block of FLUX's sizes, and projects it to the whole model. About 3
    minutes on two CPU cores."""
    from ..evaluation import bench_fit as bench
    from ..evaluation.inputs import KINDS
    from ..methods import METHODS

    if kinds:
        split, svd = ("splitquant_4", "splitquant"), ("svdquant", "svdquant_r", "svdquant_p")
        names = ("rtn", "convrot", *split, "robuq", *svd)
        work = [(kind, METHODS[name]) for kind in KINDS for name in names]
        echo(bench.kinds_text([bench.fit_kind(*task) for task in bar("fit")(work, len(work))]))
        return
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


Out = Annotated[Path, typer.Option(help="Folder for rows.json, ablation.txt and ablation.png.")]
Severity = Annotated[float, typer.Option(help="Of the outliers: 1 hard, 0.4 mild, 0 none.")]
Seeds = Annotated[
    int, typer.Option(min=1, help="Pictures of each caption; two or more show how far seeds differ.")
]
Kinds = Annotated[
    bool, typer.Option("--kinds", help="Beside it layers with inputs of eight kinds, as `nibble bench-fit`.")
]


def _ablated(out, entries, against, model, severity, seeds, kinds, ray, ray_cpus):
    """Measures, writes and prints an ablation; against: what its rows are compared with."""
    from ..evaluation.ablate import run
    from ..evaluation.ablate.plot import plot
    from ..evaluation.ablate.table import ablation_text
    from ..store.atomic import save_text

    noises = range(run.SEEDS[0], run.SEEDS[0] + seeds)
    measured = partial(run.run, out, entries, severity, bar("row"), small=_small(model))
    with workers_of(ray, ray_cpus, "cpu") as workers:
        rows = measured(seeds=noises, kinds=kinds, workers=workers)
    text = ablation_text(rows, against)
    save_text(out / "ablation.txt", text + "\n")
    echo(text)
    if find_spec("matplotlib") is not None:
        plot(out / "ablation.png", rows, against[0])


@ablate.command("splitquant")
def ablate_splitquant(
    out: Out,
    quick: Annotated[
        bool, typer.Option("--quick", help="1 and 4 slices with scales of tokens, untrained.")
    ] = False,
    model: SmallModelName = "shapes",
    severity: Severity = 1.0,
    seeds: Seeds = 2,
    kinds: Kinds = False,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """SplitQuant's slices, transforms, scales and training on a small model, hours; a stopped run keeps its
    finished rows. Rows are compared picture by picture with the default and with svdquant_r."""
    from ..evaluation.ablate.splitquant import AGAINST, entries

    _ablated(out, entries(quick), AGAINST, model, severity, seeds, kinds, ray, ray_cpus)


@ablate.command("robuq")
def ablate_robuq(
    out: Out,
    quick: Annotated[bool, typer.Option("--quick", help="What is not trained.")] = False,
    model: SmallModelName = "shapes",
    severity: Severity = 1.0,
    seeds: Seeds = 2,
    kinds: Kinds = False,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """RobuQ's steps one after the other, from ternary weights rounded to nearest, its trainings and fewer
    activation bits on a small model, hours; a stopped run goes on behind its last row."""
    from ..evaluation.ablate.robuq import AGAINST, entries

    _ablated(out, entries(quick), AGAINST, model, severity, seeds, kinds, ray, ray_cpus)


@ablate.command("grids")
def ablate_grids(
    out: Out,
    model: SmallModelName = "shapes",
    severity: Severity = 1.0,
    seeds: Seeds = 2,
    kinds: Kinds = False,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """Whole numbers against nvfp4 on a small model, also with as many bits, a quarter of an hour. Rows are
    compared picture by picture with svdquant and svdquant_r."""
    from ..evaluation.ablate.grids import AGAINST, entries

    _ablated(out, entries(), AGAINST, model, severity, seeds, kinds, ray, ray_cpus)


@ablate.command("allocation")
def ablate_allocation(
    out: Annotated[Path, typer.Option(help="Folder for rows.json and allocation.txt.")],
    severity: Severity = 1.0,
    calibrations: Annotated[int, typer.Option(min=1, help="Each with captions and noise of its own.")] = 3,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
):
    """What giving out RobuQ's activation bits by measured noise is worth on the small FLUX, with and without
    gains, picture by picture. About half an hour on a CPU core; a stopped run goes on behind its last row."""
    from ..evaluation.ablate import allocation
    from ..store.atomic import save_text

    with workers_of(ray, ray_cpus, "cpu") as workers:
        rows = allocation.run(out, severity, bar("row"), calibrations=calibrations, workers=workers)
    text = allocation.allocation_text(rows)
    save_text(out / "allocation.txt", text + "\n")
    echo(text)
