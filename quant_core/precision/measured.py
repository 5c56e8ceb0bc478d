"""What a layer may be and what that costs, measured on its output: the records that Nibble Guard and Nibble
Allocate Bits both choose from."""

from dataclasses import dataclass, field

from ...kernels.operator.spec import LinearSpec
from ..calibration.file import Calibration, CalibrationError
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem, output_sqnr
from ..store import own_json


@dataclass(frozen=True)
class Option:
    """A layer at one precision. noise: noise-to-signal ratio of its output on held-out tokens; nbytes: with
    all side data.

    bits: of the codes, the mean over in-channels, without side data. cost: multiply-adds a token, times
    `relative_cost`.
    """

    noise: float
    nbytes: int
    activation_bits: float
    weight_bits: float
    cost: float


@dataclass(frozen=True)
class Measured:
    """A layer and its options by name, e.g. "W8A8" or "robuq A3". fixed: weight-only, with one option,
    outside of averages of bits. now: what a layer that is quantized already is, and its numbers."""

    name: str
    block: str
    in_features: int
    out_features: int
    fixed: bool = False
    options: dict[str, Option] = field(default_factory=dict)
    now: tuple[str, Option] | None = None

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def what(self) -> str:
        """What it is already, e.g. "W4A4"."""
        return "" if self.now is None else self.now[0]

    @property
    def here(self) -> Option:
        """The numbers of what it is already."""
        assert self.now is not None
        return self.now[1]

    def at(self, name: str) -> Option:
        """The option of this name; what it is already where that is not better or not to be had."""
        option = self.options.get(name, self.here)
        return option if option.noise < self.here.noise else self.here


def from_json(row: dict) -> Measured:
    """What `dataclasses.asdict` made of a Measured. Raises NotOurs naming the field that is none."""
    for name, kind in {"name": str, "block": str, "fixed": bool}.items():
        own_json.field(row, name, kind)
    for name in ("in_features", "out_features"):
        own_json.field(row, name, int, 1)
    options = {name: _option(found, name) for name, found in own_json.field(row, "options", dict).items()}
    now = own_json.field(row, "now", (list, type(None)))
    if now is not None:
        if len(now) != 2 or not isinstance(now[0], str):
            raise own_json.NotOurs(f"now: expected a precision and its numbers, found {own_json.short(now)}")
        now = (now[0], _option(now[1], "now"))
    return Measured(**row | {"options": options, "now": now})


def _option(found, name):
    if not isinstance(found, dict):
        raise own_json.NotOurs(f"{name}: expected an object, found {own_json.short(found)}")
    return Option(**{part: own_json.field(found, part, (int, float), 0.0) for part in found})


def relative_cost(spec: LinearSpec | None) -> float:
    """Time of a multiply-add against int4's, by the peak rates of Ampere's and Ada's tensor cores (int4 4,
    int8 2, 16 bit 1); None is 16 bit.

    A proxy: the path is that of `kernels.plan.kernel_of` there, where 2-bit weights, and any with 8-bit
    activations, are int8 products. So fewer activation bits than 8 make a ternary layer no faster today.
    Memory traffic, quantizer and low rank are not in it.
    """
    if spec is None:
        return 4.0
    rate = lambda p: (
        4 if p.activation is None else (1 if p.weight.bits == 4 and p.activation.bits <= 4 else 2)
    )
    return sum(p.width * rate(p) for p in spec.parts) / spec.in_features


def option_of(problem: Problem, layer: QuantizedLayer | None) -> Option:
    """The numbers of a layer on the report tokens of its problem; None is 16 bit, with no noise at 2 bytes a
    weight: the 55 dB that rounding an fp32 original to bf16 leaves count as none."""
    macs = problem.original.numel()
    if layer is None:
        bias = 0 if problem.bias is None else problem.bias.numel()
        return Option(0.0, 2 * (macs + bias), 16.0, 16.0, relative_cost(None) * macs)
    # Weight-only layers, outside of every choice, may have no tokens.
    sqnr = output_sqnr(problem, layer)
    noise = 0.0 if sqnr is None else 10 ** (-sqnr / 10)
    mean = lambda bits: sum(p.width * bits(p) for p in layer.spec.parts) / layer.spec.width
    activation = mean(lambda p: 16 if p.activation is None else p.activation.bits)
    return Option(
        noise, layer.nbytes, activation, mean(lambda p: p.weight.bits), relative_cost(layer.spec) * macs
    )


def require_tokens(problem: Problem, calibration: Calibration) -> None:
    """Raises CalibrationError where the calibration holds no token to judge the layer by."""
    if (tokens := problem.tokens("report")) is None or not len(tokens):
        raise CalibrationError(
            f"calibration {calibration.path}: no held-out tokens of layer {problem.layer.input} to measure "
            "errors on. Calibrate with 2 samples or more."
        )
