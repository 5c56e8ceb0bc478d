"""What the commands share: their app, bars, notes and the device."""

import sys

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="The `nibble` command.", pretty_exceptions_enable=False
)


def bar(unit):
    from tqdm import tqdm

    return lambda items, total: tqdm(items, total=total, unit=unit, file=sys.stderr, dynamic_ncols=True)


def echo(text, err=False):
    """Prints without control characters, which names and texts of a file may hold."""
    from ...kernels.operator.errors import plain

    typer.echo(plain(text, keep="\n"), err=err)


def note(line):
    echo(line, err=True)


def device_of(name):
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
