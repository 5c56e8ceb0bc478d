"""The commands on files that are there: what they are, their formats, calibrations joined, what is left
over."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .shared import app, bar, echo


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
        typer.Argument(help="A quantized model: this pack's, ComfyUI's, comfy-kitchen's or nunchaku's."),
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
