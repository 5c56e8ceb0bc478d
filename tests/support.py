"""Measures and data that tests share."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from typer.testing import CliRunner

from comfyui_nibble.quant_core.cli.commands import app

PACK = Path(__file__).resolve().parents[1]


def copy_of_the_pack(folder: Path) -> Path:
    """A real copy of what ComfyUI needs of the pack, at `folder`."""
    for name in ("nodes", "kernels", "quant_core"):
        shutil.copytree(PACK / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(PACK / name, folder / name)
    return folder


def nibble(*args) -> str:
    """What the `nibble` command prints; its errors are raised."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def sqnr_db(reference, test) -> float:
    """10 log10 of signal over error energy."""
    reference, test = reference.double(), test.double()
    return float(
        10 * torch.log10(reference.square().sum() / (reference - test).square().sum().clamp(min=1e-30))
    )


def relative_error(reference, test) -> float:
    reference, test = reference.double(), test.double()
    return float((reference - test).norm() / reference.norm().clamp(min=1e-30))


def outlier_tokens(count, width, seed, after_gelu=False, strength=40.0):
    """Correlated tokens, one channel in 64 at `strength` (the same channels for every seed)."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(77)
    x = (
        torch.randn(count, width, generator=g)
        + torch.randn(count, 32, generator=g) @ torch.randn(32, width, generator=fixed) * 0.3
    )
    if after_gelu:
        return torch.nn.functional.gelu(x)
    factors = (0.5 * torch.randn(width, generator=fixed)).exp()
    factors[torch.randperm(width, generator=fixed)[: max(2, width // 64)]] *= strength
    return x * factors


@contextmanager
def single_thread():
    """PyTorch computes with one thread within it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
