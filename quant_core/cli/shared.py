"""What the commands share: their app, bars, notes and the device."""

import sys

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="The `nibble` command.", pretty_exceptions_enable=False
)


def bar(unit):
    from tqdm import tqdm

    return lambda items, total: tqdm(items, total=total, unit=unit, file=sys.stderr, dynamic_ncols=True)


def note(line):
    typer.echo(line, err=True)


def device_of(name):
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
