"""`nibble quantize --wish`: method, precisions and what is raised afterwards by one word, as in the node
Nibble Quantize for My Card."""

from collections.abc import Callable
from pathlib import Path

import torch

from ...kernels.dispatch import takes_components
from ...kernels.target import target_of
from ..calibration.file import Calibration
from ..formats.checkpoint import Checkpoint
from ..layer.row import Row
from ..methods import by_name
from ..precision.allocate import parse_budget
from ..precision.guarding import Asked
from ..precision.menu import MixedConfig
from ..precision.report import allocation_text
from ..precision.wish import RANK, SMALL, Choice, Facts, WishError, choose
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers
from .allocate import allocate_file, measured_gains
from .quantize import quantize_file

ROOM = 1_065_000_000  # bytes to sample beside the weights: what ComfyUI reserves for FLUX.1 at 1024 x 1024
STEPS = 20


def quantize_by_wish(
    source: Path,
    destination: Path,
    wish: str,
    calibration: Calibration | None = None,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda unit: silent,
    base3: bool = False,
    say: Callable[[str], None] = lambda line: None,
    workers: Workers = HERE,
) -> tuple[Choice, list[Row]]:
    """Quantizes `source` into `destination` as the wish has it, and returns what was chosen and the rows of
    the report.

    Every wish but "fast" needs a calibration. Wishes with a memory size count ROOM bytes for sampling; those
    that mix precisions weigh layers by `nibble gains` where the source is a diffusers folder. Raises
    WishError, and the errors of `quantize_file` and `allocate_file`, before anything is computed.
    """
    choice = _chosen(source, wish, calibration, device)
    for line in choice.why:
        say(line)
    if not choice.budget:
        method = by_name(choice.method)
        guard = Asked(choice.guard, choice.limit, allowed=choice.raised) if choice.guard else None
        rows = quantize_file(
            source,
            destination,
            method,
            method.config,
            calibration,
            device,
            progress("layer"),
            base3,
            say=say,
            guard=guard,
            workers=workers,
        )
        return choice, rows
    assert calibration is not None
    gains = None
    if Path(source).is_dir():
        gains = measured_gains(source, calibration, device, progress("layer"), workers=workers)
    config, budget = MixedConfig(SMALL, RANK), parse_budget(choice.budget)
    done, rows = allocate_file(
        source, destination, calibration, budget, config, gains, device, progress, base3, say, workers
    )
    say(allocation_text(done, "Precision of each layer"))
    return choice, rows


def _chosen(source, wish, calibration, device) -> Choice:
    checkpoint = Checkpoint(source)
    cuda, layers = torch.device(device).type == "cuda", checkpoint.family.layers(checkpoint.shapes)
    half = bool(layers) and checkpoint.get(f"{layers[0].name}.weight").dtype == torch.float16
    choice = choose(
        wish,
        Facts(
            layers,
            checkpoint.shapes,
            STEPS,
            ROOM,
            torch.cuda.get_device_properties(device).total_memory if cuda else 0,
            cpu=not cuda,
            components=takes_components(target_of(device)) and not half,
            measured=0 if calibration is None else calibration.meta["samples"],
        ),
    )
    if choice.samples and calibration is None:
        raise WishError(
            f"the wish {wish} measures on example runs of the model, and no calibration is given. Make one "
            "with `nibble calibrate` or Nibble Calibrate and name it by --calibration, or take fast."
        )
    if not choice.samples and calibration is not None:
        raise WishError(f"the wish {wish} takes no calibration. Leave it out, or take balanced, which does.")
    return choice
