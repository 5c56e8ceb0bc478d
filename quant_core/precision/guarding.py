"""The worst layers of a quantized model raised, wherever its layers lie: what Nibble Guard, `nibble guard`
and the wishes do."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..calibration.file import Calibration
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..layer.precisions import PRECISIONS, higher, w4a8, w8a8
from ..layer.row import Row
from ..run.layers import problem_of
from ..run.provenance import VERSION
from ..run.sizes import sizes
from ..run.source import Source, Weights
from ..run.unfinished import hash_of
from ..store.progress import Progress, silent
from ..store.table import Table
from ..store.workers import HERE, Workers
from .budget import Upgrade, for_memory, for_quality
from .guard import as_units, by_layer, measure
from .guard_report import Decision
from .measured import Measured, from_json

PICK: dict[str, Callable[..., dict[str, Upgrade]]] = {"quality": for_quality, "memory": for_memory}


@dataclass(frozen=True)
class Asked:
    """by: "quality", with a limit in dB, or "memory", with one in bytes. blocks: whether the layers of a
    block take one precision. allowed: precisions that a layer may be raised to."""

    by: str
    limit: float
    blocks: bool = False
    allowed: tuple[str, ...] = PRECISIONS

    @property
    def text(self) -> str:
        """What is asked for, in short."""
        return f"{self.limit:g} dB" if self.by == "quality" else f"{self.limit / 2**20:.0f} MiB more"

    def beside(self, rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]]) -> "Asked":
        """Of a limit in bytes of the whole model, what is left beside the model of `rows`; see `sizes`."""
        if self.by != "memory":
            return self
        return replace(self, limit=max(0, self.limit - sizes(rows, shapes)[0]))

    def needed(self, rows: Iterable[Row]) -> bool:
        """Whether anything may have to be raised, by errors of the same tokens that would be measured
        again."""
        errors = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        return self.by == "memory" or (bool(errors) and min(errors) < self.limit)

    def require_sense(self):
        """Raises BudgetError for a limit that means nothing."""
        PICK[self.by]((), self.limit)


def to_measure(plan: list[Layer], layers: dict[str, QuantizedLayer]) -> list[Layer]:
    """The layers of `plan` that are quantized and could be raised."""
    return [layer for layer in plan if layer.name in layers and higher(layers[layer.name].spec)]


def raise_worst(
    asked: Asked,
    plan: list[Layer],
    layers: dict[str, QuantizedLayer],
    source: Source,
    calibration: Calibration,
    device: torch.device | str = "cpu",
    progress: Callable[[str], Progress] = lambda doing: silent,
    workers: Workers = HERE,
) -> tuple[Decision, dict[str, QuantizedLayer | None], dict[str, torch.Tensor]]:
    """(the decision, {layer: what it was raised to, None at 16 bit}, {key: tensor} of those at 16 bit).

    plan: of `to_measure`. layers: {name: QuantizedLayer} of the model on the CPU; those that are raised are
    taken out of it. source: of the weights in full precision. progress("Measuring" or "Raising"): a bar.
    workers: who measures. The numbers stay beside the calibration for a run that goes on, and for another
    budget. Raises the errors of `guard.measure` and of the budget.
    """
    # Two passes: numbers of all candidates, then only the chosen ones; the candidates of a 12B model would
    # fill 18 GB.
    numbers = kept_numbers(
        plan, layers, source, calibration, asked.allowed, device, progress("Measuring"), workers
    )
    decision = decided(asked, numbers, len(layers) - len(plan))
    changing = [layer for layer in plan if layer.name in decision.layers]
    made: dict[str, QuantizedLayer | None] = {}
    rest: dict[str, torch.Tensor] = {}
    for layer in progress("Raising")(changing, len(changing)):
        precision = decision.layers[layer.name]
        made[layer.name] = _raised(source, layer, layers.pop(layer.name), precision, rest, device)
    return decision, made, rest


def decided(asked: Asked, numbers: list[Measured], weight_only: int) -> Decision:
    """What the budget picks. weight_only: how many layers were never asked about."""
    units = as_units(numbers, asked.blocks)
    chosen = PICK[asked.by](units, asked.limit)
    layers = by_layer(numbers, chosen, asked.blocks)
    return Decision(
        asked.by, asked.limit, asked.blocks, asked.allowed, numbers, units, chosen, layers, weight_only
    )


def kept_numbers(
    plan: list[Layer],
    layers: dict[str, QuantizedLayer],
    source: Source,
    calibration: Calibration,
    allowed: tuple[str, ...],
    device: torch.device | str,
    progress: Progress,
    workers: Workers = HERE,
) -> list[Measured]:
    """Of `measure`, in the order of `plan`, kept in a table beside the calibration."""
    settings = {
        "model": source.fingerprint(),
        "calibration": calibration.hash,
        "allowed": allowed,
        "nibble": VERSION,
    }
    settings["quantized"] = hash_of(t for layer in plan for t in layers[layer.name].tensors.values())
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    table = Table(Path(f"{calibration.path}.{key}.guard.json"), settings, "measured layers")
    done = {row.name: row for row in table.parsed(from_json)}
    left = [layer for layer in plan if layer.name not in done]

    def kept():  # before an interrupt can come
        for found in measure(left, layers, source, calibration, allowed, device, workers):
            table.add(asdict(found))
            yield found.name, found

    done |= dict(progress(kept(), len(left)))
    return [done[layer.name] for layer in plan]


def _raised(
    source: Weights,
    layer: Layer,
    quantized: QuantizedLayer,
    precision: str,
    rest: dict[str, torch.Tensor],
    device: torch.device | str,
) -> QuantizedLayer | None:
    """The layer at a precision, on the CPU; None at 16 bit, where its original tensors go to `rest`."""
    if precision == "W4A8":  # the same tensors: nothing to load, nothing to copy
        return w4a8(quantized)
    problem = problem_of(layer, source, None, device)
    if precision == "W8A8":
        return w8a8(problem, quantized.to(device)).to("cpu")
    tensors = {"weight": problem.original.reshape(quantized.spec.logical_shape)} | (
        {} if problem.bias is None else {"bias": problem.bias}
    )
    # In 16 bit also where the source is held in fp32, as ComfyUI does on a CPU.
    rest |= {f"{layer.name}.{leaf}": t.to("cpu", problem.dtype, copy=True) for leaf, t in tensors.items()}
    return None


def guarded(provenance: dict, decision: Decision, calibration: Calibration) -> dict:
    """The provenance of a quantized model with what was raised; a second time adds to the list."""
    entry = {
        "budget": decision.by,
        "limit": decision.limit,
        "unit": "block" if decision.blocks else "layer",
        "precisions": list(decision.allowed),
        "calibration": calibration.hash,
        "raised": decision.layers,
        "nibble": VERSION,
    }
    return provenance | {"guard": [*provenance.get("guard", ()), entry]}
