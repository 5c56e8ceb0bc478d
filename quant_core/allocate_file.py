"""`nibble allocate`: a checkpoint in; measured, allocated and quantized at the chosen widths; a Nibble file out."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .allocate import Allocation, Budget, allocate, pareto, uniform
from .budget import decibel
from .calibration.file import Calibration, CalibrationError
from .families import Layer, measured
from .families.pointwise import why_unsure
from .formats.checkpoint import Checkpoint
from .formats.errors import naming
from .formats.lock import only_run
from .formats.provenance import provenance
from .gains import SAMPLES, of_calibration
from .mixed import MIXED, MixedConfig
from .quantize import not_quantizable, require_statistics
from .quantize_file import quantize_file, require_place
from .report import Row
from .sensitivity import Sensitivity, sensitivity


@dataclass(frozen=True)
class Allocated:
    """What was chosen and why. held: bytes of what is not quantized; uniforms: {entry: every layer at it}; curve: of `pareto`."""

    budget: Budget
    table: list[Sensitivity]
    allocation: Allocation
    uniforms: dict[str, Allocation]
    curve: list[tuple[float, float]]
    held: int


def allocate_file(
    source: Path,
    destination: Path,
    calibration: Calibration,
    budget: Budget,
    config: MixedConfig,
    weights: Mapping[str, float] | None = None,
    device: str = "cpu",
    progress: Callable[[str], Callable[[Iterable, int], Iterable]] = lambda unit: lambda items, total: items,
    base3: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Allocated, list[Row]]:
    """Returns the allocation and the rows of the report. A memory budget is for all tensors of the file, as they
    are in memory: base3, see `pack.save`, makes the file smaller than that.

    The sensitivities stay in `<destination>.sensitivity.json`: a stopped run goes on there, and another budget measures nothing again.
    weights: as in `allocate`, of `gains.measure`. progress(unit): a progress bar. Raises BudgetError before anything is quantized, and the errors of `sensitivity` and `quantize_file`.
    """
    checkpoint, fingerprint, layers = opened(source, destination, calibration)
    settings = provenance(fingerprint, "sensitivity", config, calibration)
    path = Path(f"{destination}.sensitivity.json")
    with only_run(path, f"measures {checkpoint.path.name}"), naming(checkpoint.path, CalibrationError):
        table = sensitivity(layers, checkpoint.get, checkpoint.shapes, calibration, config, path, settings, device, progress("layer"))
    done = decide(table, budget, config, weights, sum(checkpoint.get(k).nbytes for k in untouched(checkpoint.shapes, table)))
    chosen = replace(config, layers=done.allocation.layers)
    rows = quantize_file(source, destination, MIXED, chosen, calibration, device, progress("layer"), base3, say=say)
    return done, rows


def opened(source: Path, destination: Path, calibration: Calibration) -> tuple[Checkpoint, str, list[Layer]]:
    """(the checkpoint, its fingerprint, its layers), once it is sure that the calibration fits and the destination can be written."""
    checkpoint = Checkpoint(source)
    require_place(destination, checkpoint, calibration)
    fingerprint = checkpoint.fingerprint()
    calibration.require_model(fingerprint)
    layers = measured(_sure(checkpoint, calibration), calibration)
    require_statistics(layers, calibration)
    return checkpoint, fingerprint, layers


def decide(table: list[Sensitivity], budget: Budget, config: MixedConfig, weights: Mapping[str, float] | None, held: int) -> Allocated:
    """The allocation, and what it is compared with. held: bytes beside the table. Raises BudgetError, ValueError for gains of other layers."""
    if unknown := set(weights or {}) - {s.name for s in table}:
        raise ValueError(f"gains are given for layers that the model does not have: {', '.join(sorted(unknown)[:3])}")
    chosen = allocate(table, budget, weights, held)
    uniforms = {e.name: uniform(table, e.name, budget, weights, held) for e in config.menu}
    return Allocated(budget, table, chosen, uniforms, pareto(table, budget, weights, held), held)


def read_gains(path: Path) -> dict[str, float]:
    """{layer: factor} of a JSON file. Raises ValueError naming the file and what is no number of 0 or more."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text, numbers of thousands of digits
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object {{layer: number}}, found {type(found).__name__}")
    for layer, gain in found.items():
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 <= gain < math.inf:
            raise ValueError(f"{path}: gain of {layer}: expected a number of 0 or more, found {gain!r}")
    return found


def measured_gains(
    source: Path, calibration: Calibration, device: str = "cpu", progress=lambda items, total: items, samples: int = SAMPLES
):
    """{layer: factor}, of `gains.of_calibration`, for the model of a diffusers `transformer` folder; kept beside the calibration.

    Raises the errors of `of_calibration` and, where something is left to measure, ValueError for a source that is no such folder.
    """
    from . import diffusers_model

    checkpoint = Checkpoint(source)
    calibration.require_model(checkpoint.fingerprint())
    layers = with_choice(measured(_sure(checkpoint, calibration), calibration))

    def network():
        model = diffusers_model.full(source, device)
        names = diffusers_model.modules_of(checkpoint.family, layers, model)
        return model, {name: [model.get_submodule(t) for t in targets] for name, targets in names.items()}

    return of_calibration(calibration, [layer.name for layer in layers], network, device, progress, samples)


def _sure(checkpoint, calibration) -> list[Layer]:
    return [layer for layer in checkpoint.family.layers(checkpoint.shapes) if not why_unsure(layer, calibration)]


def with_choice(layers: Iterable[Layer]) -> list[Layer]:
    """Those that a menu is for, and whose gains count."""
    return [layer for layer in layers if not layer.weight_only and not not_quantizable(layer)]


def untouched(keys: Iterable[str], table: list[Sensitivity]) -> list[str]:
    """The tensors that are written as they are."""
    quantized = {s.name for s in table}
    return [k for k in keys if k.rpartition(".")[0] not in quantized]


def as_text(done: Allocated, title: str) -> str:
    """The budget, what it came to against one entry for all layers, and what each layer got, in the order of the forward pass."""
    budget, chosen = done.budget, done.allocation
    layers = [s for s in done.table if not s.fixed]
    db = lambda noise: "exact" if noise <= 0 else f"{decibel(noise):.2f} dB"
    line = lambda name, a: f"  {name:22}  {budget.text(a.reached):>34}  {db(a.noise / len(layers)):>9}  {a.cost / base:5.2f}"
    base = sum(s.weights for s in layers)
    lines = [f"{title}: {budget.text()}", f"  {'':22}  {'':>34}  {'mean noise':>9}  cost, the speed proxy (int4 1, int8 2, 16 bit 4)"]
    lines.append(line("allocated", chosen))
    lines += [line(f"all {name}", a) for name, a in done.uniforms.items()]
    if fixed := len(done.table) - len(layers):
        lines.append(
            f"{fixed} weight-only layers are outside of the menu; a memory budget pays for them and for {done.held / 1e6:.1f} MB more."
        )
    lines.append("")
    width = max(len(s.name) for s in layers)
    names = list(done.uniforms)
    lines.append(f"{'layer':{width}}  {'N x K':>13}  " + "  ".join(f"{n:>14}" for n in names) + "  takes")
    for s in layers:
        cells = "  ".join(f"{db(s.cells[n].noise):>14}" for n in names)
        lines.append(f"{s.name:{width}}  {f'{s.out_features} x {s.in_features}':>13}  {cells}  {chosen.layers[s.name]}")
    return "\n".join(lines)
