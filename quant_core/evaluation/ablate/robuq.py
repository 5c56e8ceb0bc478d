"""The rows of RobuQ's ablation: ternary weights rounded to nearest, what each step of the method adds to
them, its trainings, fewer activation bits, and svdquant_r, which has four bits a weight."""

from dataclasses import replace

from ...methods import METHODS, Method
from ...methods.robuq import RobuQConfig
from ...training.presets import PRESETS, UNTRAINED
from .splitquant import Entry

BITS = 4  # of activations, in the rows that add one step after the other
FEWER = (3, 2)
BASE = "svdquant_r"
NEAREST = RobuQConfig(
    activation_bits=BITS,
    rank=0,
    rotation=0,
    smooth=((0.0, 0.0),),
    clip=(),
    low_rank=("plain",),
    iterations=0,
    gptq=False,
)
# Each row has the steps of the rows before it; the last is the method as it is.
STEPS = {
    "nearest": (),
    "+ rotation": ("rotation",),
    "+ smoothing": ("rotation", "smooth"),
    "+ clip": ("rotation", "smooth", "clip"),
    "+ low rank": ("rotation", "smooth", "clip", "rank", "low_rank", "iterations"),
    "+ gptq": ("rotation", "smooth", "clip", "rank", "low_rank", "iterations", "gptq"),
}


def stepped(name: str) -> Entry:
    """The row of STEPS that is called so, untrained."""
    default = RobuQConfig(activation_bits=BITS)
    taken = {field: getattr(default, field) for field in STEPS[name]}
    return Entry(f"ternary A{BITS}, {name}", _method(replace(NEAREST, **taken)))


def at_bits(bits: int, training: str = "none") -> Entry:
    """RobuQ's defaults at so many activation bits, trained by one of its presets."""
    preset = UNTRAINED if training == "none" else PRESETS["robuq"][training]
    how = "" if training == "none" else f", trained {training}"
    return Entry(f"robuq A{bits}{how}", _method(RobuQConfig(activation_bits=bits)), preset)


def entries(quick: bool = False) -> list[Entry]:
    """All rows, the untrained ones first, which are all with `quick`."""
    untrained = [Entry(BASE, METHODS[BASE]), *map(stepped, STEPS), *map(at_bits, FEWER)]
    trained = [at_bits(bits, name) for bits in (BITS, *FEWER[-1:]) for name in PRESETS["robuq"]]
    return untrained if quick else [*untrained, *trained]


def _method(config: RobuQConfig) -> Method:
    return replace(METHODS["robuq"], config=config)


AGAINST = (stepped("nearest").name, BASE)  # what the rows are compared with, picture by picture
