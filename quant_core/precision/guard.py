"""What a quantized layer can be raised to, and what that brings on held-out tokens."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ..calibration.file import Calibration, CalibrationError
from ..families import Layer
from ..layer.linear import QuantizedLayer
from ..layer.precisions import PRECISIONS, higher, w4a8, w8a8
from ..layer.problem import Problem, output_sqnr
from ..run.layers import problem_of, require_statistics
from ..run.source import Weights
from ..store import own_json
from .budget import Option, Unit


@dataclass(frozen=True)
class Candidate:
    """A layer at a higher precision. layer: None at 16 bit; nbytes: with all side data; noise: of its output
    on the report tokens."""

    precision: str
    layer: QuantizedLayer | None
    nbytes: int
    noise: float


def candidates(problem: Problem, quantized: QuantizedLayer, allowed=PRECISIONS) -> Iterator[Candidate]:
    """Yields what the layer can be raised to among `allowed`, one at a time in memory. `quantized` is on the
    device of the problem."""
    for precision in higher(quantized.spec):
        if precision not in allowed:
            continue
        if (
            precision == "16 bit"
            # 2 bytes each, also of an fp32 original: the 55 dB that rounding it to bf16 leaves count as no
            # noise.
        ):
            yield Candidate(
                precision,
                None,
                2 * (problem.original.numel() + (0 if problem.bias is None else problem.bias.numel())),
                0.0,
            )
        else:
            layer = w4a8(quantized) if precision == "W4A8" else w8a8(problem, quantized)
            yield Candidate(precision, layer, layer.nbytes, noise_of(problem, layer))


def noise_of(problem: Problem, layer: QuantizedLayer) -> float:
    """Noise-to-signal ratio of the layer's output on the report tokens."""
    sqnr = output_sqnr(problem, layer)
    assert sqnr is not None  # there are tokens: `require_tokens`
    return 10 ** (-sqnr / 10)


def require_tokens(problem: Problem, calibration: Calibration):
    """Raises CalibrationError where the calibration holds no token to judge the layer by."""
    if (tokens := problem.tokens("report")) is None or not len(tokens):
        raise CalibrationError(
            f"calibration {calibration.path}: no held-out tokens of layer {problem.layer.input} to measure "
            "errors on. "
            "Calibrate with 2 samples or more."
        )


@dataclass(frozen=True)
class Measured:
    """The numbers of one layer. what: its precision, e.g. "W4A4"; options: {precision: (bytes, noise)}, empty
    if it can only stay."""

    name: str
    block: str
    what: str
    nbytes: int
    noise: float
    options: dict[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: dict) -> "Measured":
        """Of what `asdict` makes of it. Raises NotOurs naming the field that is none."""
        for name, kind in {"name": str, "block": str, "what": str, "nbytes": int, "options": dict}.items():
            own_json.field(row, name, kind)
        own_json.field(row, "noise", (int, float), 0.0)
        for precision in row["options"]:
            found = own_json.field(row["options"], precision, list)
            if [type(v) for v in found] not in ([int, float], [int, int]) or not 0 <= found[1] < math.inf:
                raise own_json.NotOurs(
                    f"{precision}: expected bytes and noise, found {own_json.short(found)}"
                )
        return cls(**row)

    def at(self, precision: str) -> tuple[int, float]:
        """(bytes, noise) at a precision; as it is where that is not better or not to be had."""
        nbytes, noise = self.options.get(precision, (self.nbytes, self.noise))
        return (nbytes, noise) if noise < self.noise else (self.nbytes, self.noise)


def measure(
    layers: Iterable[Layer],
    quantized: dict[str, QuantizedLayer],
    source: Weights,
    calibration: Calibration,
    allowed=PRECISIONS,
    device: str | torch.device = "cpu",
) -> Iterator[Measured]:
    """Yields the numbers of each of the layers, all in `quantized` with something `higher`; keeps no tensor
    from one to the next.

    source: of the weights in full precision. Raises what `require_statistics` does, CalibrationError where
    the calibration holds no token to judge by, and UnfitLayer.
    """
    layers = list(layers)
    require_statistics(layers, calibration)
    for layer in layers:
        problem = problem_of(layer, source, calibration, device, second_moments=False)
        require_tokens(problem, calibration)
        here = quantized[layer.name].to(device)
        options = {c.precision: (c.nbytes, c.noise) for c in candidates(problem, here, allowed)}
        what = here.spec.describe().split()[0]
        yield Measured(layer.name, layer.block, what, here.nbytes, noise_of(problem, here), options)


def as_units(measured: list[Measured], blocks: bool) -> list[Unit]:
    """One Unit a layer, or one a block: then all its layers take a precision together, but for those that
    would measure worse."""
    groups: dict[str, list[Measured]] = {}
    for m in measured:
        groups.setdefault(m.block if blocks else m.name, []).append(m)
    units = []
    for name, group in groups.items():
        nbytes, noise = sum(m.nbytes for m in group), sum(m.noise for m in group)
        options = []
        for precision in PRECISIONS:
            if any(precision in m.options for m in group):
                after = [m.at(precision) for m in group]
                options.append(Option(precision, sum(b for b, _ in after) - nbytes, sum(n for _, n in after)))
        units.append(Unit(name, noise, tuple(options), len(group)))
    return units


def by_layer(measured: list[Measured], chosen: dict[str, Option], blocks: bool) -> dict[str, str]:
    """{layer: precision} of the layers that change, from what was chosen for the units."""
    out = {}
    for m in measured:
        option = chosen.get(m.block if blocks else m.name)
        if option is not None and m.at(option.precision) != (m.nbytes, m.noise):
            out[m.name] = option.precision
    return out
