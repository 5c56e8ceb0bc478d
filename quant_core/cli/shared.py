"""What the commands share: their app, bars, notes and the device."""

import sys
from contextlib import contextmanager

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


@contextmanager
def workers_of(address, cpus, device):
    """Who does the work: a Ray cluster where --ray names one, else this process."""
    if address is None:
        from ..store.workers import HERE

        yield HERE
        return
    from ..cluster.session import connected

    with connected(address, cpus, 1.0 if device.startswith("cuda") else 0.0) as cluster:
        yield cluster


def prompts_of(path):
    """The lines of a file of prompts. Raises ValueError naming a file that is no text or has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:  # bytes that are no text
        raise ValueError(f"{path}: not text in UTF-8 ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no prompts")
    return lines
