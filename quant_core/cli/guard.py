"""`nibble guard`: a quantized file and its source in, another file with its worst layers raised out."""

from collections.abc import Callable
from pathlib import Path

from ...kernels.operator.errors import naming
from ..calibration.file import Calibration, CalibrationError
from ..calibration.observe import measured
from ..formats import nibble
from ..formats.checkpoint import Checkpoint
from ..formats.detect import open_quantized
from ..formats.opened import Opened
from ..precision.budget import BudgetError
from ..precision.guard_report import Decision, rows_after
from ..precision.guarding import Asked, guarded, raise_worst, to_measure
from ..run.provenance import origins
from ..store.atomic import require_output
from ..store.lock import only_run
from ..store.progress import Progress, silent
from ..store.workers import HERE, Workers


def guard_file(
    source: Path,
    quantized: Path,
    destination: Path,
    calibration: Calibration,
    asked: Asked,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda unit: silent,
    workers: Workers = HERE,
) -> Decision:
    """Writes `destination`: the model of `quantized` with what `asked` raises, from the weights of `source`.

    Both inputs stay as they are; what is measured, by `workers`, is kept beside the calibration. Raises
    ValueError where `quantized` is no Nibble file or was not made from `source`, OverInput, Busy,
    BudgetError, and the errors of `raise_worst`, before anything is computed.
    """
    asked.require_sense()
    checkpoint, packed = Checkpoint(source), open_quantized(quantized)
    require_output(destination, [*checkpoint.inputs, *packed.inputs, *calibration.files])
    pack = _made_from(packed, checkpoint)
    calibration.require_model(checkpoint.fingerprint())
    layers = {name: pack.layer(name) for name in pack.specs}
    plan = to_measure(measured(checkpoint.family.layers(checkpoint.shapes), calibration), layers)
    with (
        only_run(destination, f"raises layers of {pack.path.name}"),
        naming(checkpoint.path, but=(CalibrationError, BudgetError)),
    ):
        decision, made, in_16_bit = raise_worst(
            asked, plan, layers, checkpoint, calibration, device, lambda doing: progress("layer"), workers
        )
        layers |= {name: layer for name, layer in made.items() if layer is not None}
        rest = {key: pack.tensor(key) for key in pack.rest} | in_16_bit
        provenance = guarded(pack.provenance, decision, calibration)
        rows = rows_after(pack.report, decision, made)
        nibble.save(destination, layers, rest, pack.family, provenance, rows, bool(pack.base3), pack.origin)
    return decision


def _made_from(packed: Opened, checkpoint: Checkpoint) -> nibble.PackFile:
    if not isinstance(packed, nibble.PackFile):
        raise ValueError(
            f"{packed.path}: {packed.kind}, and only this pack's own files say what they were made from. "
            "Quantize the model with `nibble quantize` and raise that."
        )
    made, asked = origins(packed.provenance), checkpoint.fingerprint()
    if other := sorted(made - {asked}):
        raise ValueError(
            f"{packed.path}: was made from model {', '.join(other)}, {checkpoint.path} is {asked}. Name the "
            "full-precision model that it was quantized from."
        )
    return packed
