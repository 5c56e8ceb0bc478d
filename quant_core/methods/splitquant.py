"""SplitQuant (ICLR 2026 submission 23537): in-channels cut into slices that share a transform, no low-rank
branch.

The method `splitquant_4` is the paper's before it is trained, the defaults of SplitQuantConfig: four slices
share a Kronecker transform, with one scale a token and one a channel, and the product is a plain INT4 GEMM.

    x / s = [x_1 .. x_S], x_i as a matrix (p1, p2);  z_i = P1^T x_i P2;  y = sum_i s_x s_w (q(z_i) . q(W_i s
    P^-T)) + b

P is an orthogonal start, or one that balances both sides (`balance`). Training it is left to blocks
(training/presets.py): on a layer's own output, 300 steps gained 1.7 dB a layer in the small FLUX and lost 2
dB of the picture. Beside it, each where it helps: channels sorted before they are cut (PermuQuant), and the
worst of them in 8 bit (Atom, arXiv 2310.19102; QUIK, arXiv 2310.09259).

The method `splitquant`, ROTATED, has narrower slices, Hadamard matrices, and a scale for each 64 channels on
both sides (`split_rotated`): the best of the family, for a quarter of a bit a weight.
"""

from dataclasses import dataclass, fields, replace

import torch

from ..layer.assemble import assemble, fit_parts
from ..layer.problem import Fitted, Problem, output_sqnr
from .factors import NoBalancedFactors, balanced
from .split_part import SplitPart
from .split_rotated import RotatedPart
from .svdquant import SVDQuantConfig

# What the worst channels in 8 bit must bring a layer: they cost it a gather of x and a second product. In the
# small FLUX the layers below `guard_db` gain 5 to 8 dB: every value up to 5 chooses the same.
WORST_DB = 1.0
# What an order of channels must bring a part; 0 to 0.5 dB in the small FLUX, where slices are as wide as most
# parts, and whose pictures do not tell 0, 0.25 and no order apart (better in 24 and in 22 of 48).
SORT_DB = 0.25
TRANSFORMS = ("identity", "hadamard", "orthogonal", "affine", "rotation")
SCALES = ("token", "slice", "group")


@dataclass(frozen=True)
class SplitQuantConfig:
    """slices: of each part of a layer, fewer where one would have less than `least` channels; per_slice: a
    transform for each. transform: "identity", "hadamard", "orthogonal" (Hadamard where a size is a power of
    two, else random), "affine" (the same after factors that balance both sides, where that is better) or
    "rotation": Hadamard blocks of 64 or 256 channels, or none, whatever is best for the part, with scales of
    groups; slices, least, per_slice, clip, worst and sort do not go with it.
    scales: "token" (one a token, one an out-channel), "slice" (one a token and slice, one an out-channel and
    slice) or "group" (of 64 channels, on both sides). smooth: candidates (alpha, beta) of absmax(x)^alpha /
    absmax(w)^beta. clip: fit the range of activations; off, since on the small FLUX it gains 0.7 dB a layer
    and loses 2.0 dB of a picture (1.5 to 2.4, 39 of 48; 0.7 with scales of groups, 0.2 to 1.4, 33 of 48):
    what is cut off is a bias, which adds up over the steps. worst: 0, 64 or 128
    channels that become a slice of their own in 8 bit on both sides, in layers of less than `guard_db` SQNR
    on held-out tokens that gain WORST_DB by it. sort: by magnitude before the cut, or dealt out to the
    slices, in parts that gain SORT_DB by it. rows: out-channels that candidates are judged on; tokens:
    held-out tokens they are judged on. gptq: also try it. rank: of weight-only layers, the others have no
    branch.
    """

    slices: int = 4
    least: int = 256
    per_slice: bool = False
    transform: str = "orthogonal"
    scales: str = "token"
    smooth: tuple = ((0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (0.65, 0.35), (0.8, 0.2))
    clip: bool = False
    worst: int = 0
    guard_db: float = 20.0
    sort: bool = False
    rows: int = 512
    tokens: int = 512
    gptq: bool = True
    rank: int = 32
    damp: float = 0.01
    seed: int = 0

    def __post_init__(self):
        for name, offered in (("transform", TRANSFORMS), ("scales", SCALES), ("worst", (0, 64, 128))):
            if getattr(self, name) not in offered:
                raise ValueError(
                    f"splitquant: {name} must be one of {', '.join(map(str, offered))}, found "
                    f"{getattr(self, name)!r}"
                )
        if self.transform == "rotation":
            default = {f.name: f.default for f in fields(self)} | {"scales": "group"}
            for name in ("scales", "slices", "least", "per_slice", "clip", "worst", "sort"):
                if getattr(self, name) != default[name]:
                    raise ValueError(
                        f"splitquant: {name} must be {default[name]} with the transform rotation, found "
                        f"{getattr(self, name)!r}. Take the method splitquant_4, or set another transform: "
                        f"{', '.join(TRANSFORMS[:-1])}."
                    )


ROTATED = SplitQuantConfig(transform="rotation", scales="group", smooth=SVDQuantConfig.smooth)


def fit(problem: Problem, config: SplitQuantConfig) -> Fitted:
    """Fits each part of the layer on its own. Without statistics: the start, no smoothing, no clip, channels
    as they are; a rotation."""
    if config.transform == "rotation":
        return _rotated(problem, config)
    parts = [SplitPart(problem, torch.arange(p.start, p.stop), config) for p in problem.layer.parts]
    if config.sort:
        parts = [_sorted(problem, part, config) for part in parts]
    choices: dict[str, object] = {}
    for i, part in enumerate(parts):
        choices |= part.chosen if len(parts) == 1 else {f"{i}.{k}": v for k, v in part.chosen.items()}
    layer = _layer(problem, parts)
    if config.worst and parts[0].x is not None:
        layer, chosen = _guarded(problem, parts, layer, config)
        choices |= chosen
    return Fitted(layer, choices)


def _rotated(problem, config):
    settings = SVDQuantConfig(
        rank=0,
        smooth=config.smooth,
        gptq=config.gptq,
        damp=config.damp,
        tokens=config.tokens,
        rough_rows=config.rows,
    )
    return fit_parts(problem, lambda part: RotatedPart(problem, part, settings).fit())


def _layer(problem, parts):
    order = torch.cat([part.index for part in parts])
    start, made = 0, []
    for part in parts:
        made += part.stored(start)
        start += len(part.index)
    moved = not torch.equal(order, torch.arange(start))
    return assemble(problem, made, order.to(problem.weight.device) if moved else None)


def _sorted(problem, part, config):
    """The part with its channels by magnitude, or so dealt out that each slice has as many of each magnitude,
    where that is SORT_DB better."""
    if part.x is None:
        return part
    ascending = part.index[part.shares().argsort().cpu()]
    best, limit = part, part.error * 10 ** (-SORT_DB / 10)
    for name, index in {
        "by magnitude": ascending,
        "dealt by magnitude": ascending.view(-1, part.slices).T.flatten(),
    }.items():
        other = SplitPart(problem, index, config)
        if other.error < min(limit, best.error):
            other.chosen["order"] = name
            best = other
    return best


def _guarded(problem, parts, layer, config):
    """(layer, {choice: value}): with the worst channels of one part as a slice in 8 bit behind the others,
    where the layer needs it and gains by it. Both rules of which are the worst are tried: on the small FLUX,
    "share" won in 4 layers and "error" in 3."""
    before = output_sqnr(problem, layer, "select")
    if before >= config.guard_db:
        return layer, {}
    best, found = before + WORST_DB, (layer, {})
    eight = replace(config, transform="identity", scales="token", clip=False, gptq=False)
    for i, part in enumerate(parts):
        width = len(part.index) - config.worst
        if width < 64:
            continue
        for rule, score in {"error": part.blame(), "share": part.shares()}.items():
            out = torch.zeros(len(part.index), dtype=torch.bool)
            out[score.topk(config.worst).indices.cpu()] = True
            rest = SplitPart(problem, part.index[~out], replace(config, slices=_divisor(width, config)))
            trial = _layer(
                problem,
                [*parts[:i], rest, *parts[i + 1 :], SplitPart(problem, part.index[out], eight, bits=8)],
            )
            if (db := output_sqnr(problem, trial, "select")) > best:
                best, found = db, (trial, {"worst": f"8 bit {config.worst} channels by {rule}"})
    return found


def _divisor(width, config) -> int:
    """The most slices up to those asked for that cut the width into slices with factors."""
    for slices in range(config.slices, 1, -1):
        try:
            if width % slices == 0 and balanced(width // slices):
                return slices
        except NoBalancedFactors:
            continue
    return 1
