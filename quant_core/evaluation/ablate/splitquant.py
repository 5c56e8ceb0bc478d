"""The rows of SplitQuant's ablation: the default, every untrained combination of the paper's form that is one
of its own, trained variants of both, other methods."""

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, cast

from ....kernels.operator.spec import LinearSpec, PartSpec
from ....kernels.operator.transforms import rotation_size
from ...methods import METHODS, Method, split_rotated
from ...methods.factors import balanced
from ...methods.splitquant import SplitQuantConfig
from ...training.presets import PRESETS, UNTRAINED, Preset
from ...training.reconstruct import TrainConfig
from .cost import relative

SLICES = (1, 2, 4, 8, 16)
PAIRS = ("shared", "per slice")
TRANSFORMS = ("hadamard", "orthogonal", "affine")
SCALES = ("token", "slice", "group")
CLIPS = (False, True)
FACTORS = ("slices", "pairs", "transform", "scales", "clip")
PAPER = (4, "shared", "hadamard", "token", False)  # as `splitquant_4` in the small FLUX
BASELINES = ("splitquant", "svdquant_r", "svdquant", "convrot")
AGAINST = BASELINES[:2]  # what the rows are compared with, picture by picture
WIDTHS = (256, 1024)  # of the parts of the small FLUX's layers
LEAST = 16  # channels a slice: 256 / 16


@dataclass(frozen=True)
class Entry:
    """A row to measure. levels: {factor: its level} of the untrained factorial, {} of other rows; pictures:
    sample with it at once."""

    name: str
    method: Method
    preset: Preset = UNTRAINED
    levels: tuple[tuple[str, object], ...] = ()
    pictures: bool = True

    @property
    def settings(self) -> dict:
        """What decides the row's figures."""
        return {
            "method": self.method.name,
            "config": asdict(self.method.config),
            "training": asdict(self.preset),
        }


def factorial(quick: bool = False) -> list[tuple]:
    """Combinations (slices, pairs, transform, scales, clip), each a layer of its own.

    Left out: a pair for each slice, and scales of slices, where there is one slice; a pair for each slice of
    the fixed transforms, which has the same factors for all; "orthogonal" where it is "hadamard" since all
    factors are powers of two, as in the small FLUX.
    """
    found = []
    for slices, pairs, transform, scales, clip in product(SLICES, PAIRS, TRANSFORMS, SCALES, CLIPS):
        alone = slices == 1 and (pairs == "per slice" or scales == "slice")
        fixed = pairs == "per slice" and transform != "affine"
        powers = all(n & (n - 1) == 0 for w in WIDTHS for n in balanced(w // slices))
        if not (alone or fixed or (transform == "orthogonal" and powers)) and not (
            quick and (slices not in (1, 4) or scales != "token")
        ):
            found.append((slices, pairs, transform, scales, clip))
    return found


def entries(quick: bool = False) -> list[Entry]:
    """All rows, the most informative first: the default and other methods, 4 slices from the paper's form
    outwards, that form at other numbers of slices, trained ones (not with `quick`), the rest of the
    factorial."""
    levels = sorted(factorial(quick), key=_changes)
    four = [combination for combination in levels if combination[0] == 4]
    sweep = [c for c in levels if c[0] != 4 and c[1:] == PAPER[1:]]
    rest = [c for c in levels if c not in four and c not in sweep]
    baselines = [Entry(name, METHODS[name]) for name in BASELINES]
    return [
        *baselines,
        *map(untrained, four),
        *map(untrained, sweep),
        *([] if quick else trained()),
        *map(untrained, rest),
    ]


def _changes(combination) -> int:
    return sum(a != b for a, b in zip(combination, PAPER, strict=True))


def untrained(combination) -> Entry:
    """Pictures only of 4 slices: a sampling of 24 takes longer than a fit."""
    return Entry(
        _name(combination),
        _method(combination),
        UNTRAINED,
        tuple(zip(FACTORS, combination, strict=True)),
        combination[0] == 4,
    )


def trained() -> list[Entry]:
    """The default and the paper's form trained by the standard preset, the latter also without the coherence
    of its loss, with a pair for each slice, with one slice; by the blocks stage of the best one, whole and
    with pieces of it left out; by all of the best one."""
    standard, best = PRESETS["splitquant_4"]["standard"], PRESETS["splitquant_4"]["best"]
    alone: dict[str, dict[str, Any]] = {
        "not coherent": {"coherence": 0.0},
        "not isolated": {"isolate": False},
        "not adaptive": {"adaptive": False},
    }
    rows = [
        Entry("splitquant, trained", METHODS["splitquant"], PRESETS["splitquant"]["standard"]),
        _trained(PAPER, "trained", standard),
    ]
    in_blocks = cast(TrainConfig, best.blocks)
    for left in sorted(product(*((False, True) for _ in alone)), key=sum):
        names = [name for name, out in zip(alone, left, strict=True) if out]
        config = replace(in_blocks, **{k: v for name in names for k, v in alone[name].items()})
        rows.append(_trained(PAPER, ", ".join(["trained in blocks", *names]), Preset(config, None)))
    incoherent = lambda config: config and replace(config, coherence=0.0)
    rows.append(
        _trained(
            PAPER,
            "trained, not coherent",
            replace(standard, blocks=incoherent(standard.blocks), distill=incoherent(standard.distill)),
        )
    )
    rows += [_trained(c, "trained", standard) for c in ((4, "per slice", *PAPER[2:]), (1, *PAPER[1:]))]
    return [*rows, _trained(PAPER, "trained best", best)]


def _trained(combination, how, preset) -> Entry:
    return Entry(f"{_name(combination)}, {how}", _method(combination), preset)


def _name(combination) -> str:
    slices, pairs, transform, scales, clip = combination
    return " ".join(
        [
            f"K={slices}",
            transform,
            *["per slice"] * (pairs == "per slice"),
            f"scales {scales}",
            *["clip"] * clip,
        ]
    )


def _method(combination) -> Method:
    slices, pairs, transform, scales, clip = combination
    config = SplitQuantConfig(slices, LEAST, pairs == "per slice", transform, scales, clip=clip)
    return replace(METHODS["splitquant_4"], config=config)


def cost_at(method: Method, width: int = 3072) -> float:
    """`relative` of a square layer of another width."""
    config = method.config
    if isinstance(config, SplitQuantConfig) and config.transform == "rotation":
        part = PartSpec(0, width, rotation=rotation_size(width, max(split_rotated.WIDTHS)))
    elif isinstance(config, SplitQuantConfig):
        part = PartSpec(0, width, kronecker=balanced(width // config.slices))
    else:
        rank = getattr(config, "rank", 0)
        part = PartSpec(0, width, rank=rank, rotation=rotation_size(width, config.rotation))
    return float(relative([LinearSpec(width, width, (part,))]))
