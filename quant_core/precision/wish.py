"""From a wish in a word to everything that a quantization asks for: how it is calibrated, by which method,
and what is raised afterwards."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from ...kernels.operator.quantizers import GROUP
from ..calibration.plan import inputs_of
from ..families import Layer
from ..layer.precisions import PRECISIONS
from ..layer.statistics import InputStatistics
from ..run.layers import not_quantizable
from ..run.verdict import CLOSE, VERY_CLOSE, percent
from .menu import Entry

CARDS = (6, 8, 10, 12, 16, 24)
WISHES = ("balanced", "fast", "best", "smallest", *(f"fits {size} GB" for size in CARDS))
RANK = 32
# For models that 4 bits do not make small enough: ternary weights, in 8-bit activations, which cost them
# neither memory nor time (`measured.relative_cost`), or 4 bits.
SMALL = (
    Entry("robuq A8", "robuq", (("activation_bits", 8),)),
    Entry("svdquant_r W4A4", "svdquant_r"),
)
# Picture by picture over svdquant_r, hard outliers: landscapes at rank 32 +1.5 dB (16 of 16), at rank 4 +0.2
# (14 of 16); the small PixArt at rank 4 +10 dB (32 of 32); the shapes +0.2 (52 of 96).
FOUR, FOUR_PLAIN = "svdquant_p", "svdquant_r"
FOUR_WHY = "Method {}: 4 bits and a small 16-bit part in each layer, the closest of the 4-bit methods{}."
SMALLEST = "W2.25"  # an eighth of the weights in 4 bits, where they count most
SPARE = 600_000_000  # what a driver, a desktop and ComfyUI's own reserve take of a card
LEAST, MOST = 2**30, 16 * 2**30  # of memory for the statistics of one pass


class WishError(ValueError):
    """A wish that this model cannot have, or has already."""


@dataclass(frozen=True)
class Facts:
    """What the choice is made of.

    layers: to quantize; shapes: {key: shape} of the whole model. steps: that it is usually sampled with.
    room: bytes that sampling takes beside the weights. card: bytes of memory of what computes, cpu: whether
    that is no card. components: whether kernels take principal components there, in the model's dtype.
    measured: samples of a calibration that is there already, 0 where none is.
    """

    layers: list[Layer]
    shapes: Mapping[str, tuple[int, ...]]
    steps: int
    room: int
    card: int
    cpu: bool = False
    components: bool = True
    measured: int = 0

    @property
    def whole(self) -> int:
        """Bytes of the model in 16 bit."""
        return 2 * sum(map(prod, self.shapes.values()))

    def at(self, bits: int) -> int:
        """Bytes of the model with all layers at 4 bits (svdquant_r) or 2 (robuq), roughly."""
        layers = [layer for layer in self.layers if not not_quantizable(layer)]
        before = 2 * sum(layer.in_features * layer.out_features for layer in layers)
        return self.whole - before + sum(_layer_bytes(layer, bits) for layer in layers)


@dataclass(frozen=True)
class Choice:
    """What is done. method: of METHODS, "" where each layer gets its own within `budget` (of Nibble Allocate
    Bits, over the menu SMALL). samples, steps: of the calibration, none at 0; memory: bytes for its
    statistics.

    guard: "" for none, "quality" with `limit` in dB a layer, "memory" with `limit` in bytes of the whole
    model; raised: the precisions it may take. size: bytes that the model will have, roughly. why: for a
    person, a sentence each.
    """

    wish: str
    method: str
    samples: int
    steps: int
    memory: int
    size: int
    budget: str = ""
    guard: str = ""
    limit: float = 0.0
    raised: tuple[str, ...] = PRECISIONS
    why: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """For a file's name: "fits8GB"."""
        return self.wish.replace(" ", "")


def choose(wish: str, facts: Facts) -> Choice:
    """The Choice for one of WISHES. Raises WishError, naming sizes, where a size cannot be met or the model
    fits as it is."""
    if wish not in WISHES:
        raise WishError(f"unknown wish {wish!r}. Wishes: {', '.join(WISHES)}.")
    if match := re.fullmatch(r"fits (\d+) GB", wish):
        return _fitting(wish, int(match[1]), facts)
    return {"fast": _fast, "balanced": _balanced, "best": _best, "smallest": _smallest}[wish](wish, facts)


def _fast(wish, facts):
    # Also without examples the closest of the 4-bit methods. The small FLUX without outliers, with mild and
    # with hard ones, 8 pictures: svdquant_r at rank 4, which is what rank 32 is of FLUX's widths, 32.0, 30.9
    # and 19.2 dB; convrot 30.2, 28.9 and 16.2 dB; rounding 25.4, 20.6 and 9.6.
    told = "No example runs of the model, so it takes minutes, and nothing measures how close it comes."
    why = (FOUR_WHY.format(FOUR_PLAIN, " that need no examples"), told, *_over(facts, facts.at(4)))
    return Choice(wish, FOUR_PLAIN, 0, 0, _memory(facts), facts.at(4), why=why)


def _balanced(wish, facts):
    below = f"Layers that come out below {CLOSE:.0f} dB ({percent(CLOSE)} off) go into 8 or 16 bit."
    return _four_bits(wish, facts, (16, 12), facts.at(4), below, guard="quality", limit=CLOSE)


def _best(wish, facts):
    below = (
        f"Layers that come out below {VERY_CLOSE:.0f} dB ({percent(VERY_CLOSE)} off) go into 8 or 16 bit, "
        "however many: the model may get larger and slower than with balanced."
    )
    return _four_bits(wish, facts, (32, 20), facts.at(4), below, guard="quality", limit=VERY_CLOSE)


def _smallest(wish, facts):
    why = (
        "Weights of three values (method robuq) in most layers, 4 bits (svdquant_r) in the eighth that "
        "needs them most: the smallest there is, at a clear loss."
    )
    size = round(facts.at(2) + (facts.at(4) - facts.at(2)) / 8)
    return _mixed(wish, facts, size, SMALLEST, why)


def _fitting(wish, card, facts):
    room = card * 2**30 - SPARE - facts.room  # cards are sold in GiB
    if facts.whole <= room:
        raise WishError(
            f"{wish}: this model takes {_gb(facts.whole)} as it is, and with {_gb(facts.room)} to sample "
            "fits such a card without being quantized. Take balanced or fast to make it smaller and faster, "
            "or a smaller card."
        )
    if facts.at(2) > room:
        raise WishError(_too_large(wish, facts))
    left = (
        f"{_gb(room)} for the model: a card of {card} GB, less {_gb(SPARE)} for the system and "
        f"{_gb(facts.room)} to sample."
    )
    if (four := facts.at(4)) <= room:
        rest = "What room is left goes to the layers that are furthest off: they get 8 or 16 bit."
        # Without W4A8: it takes no memory, so every layer would get it, and be slower for it on many cards.
        raised = ("W8A8", "16 bit")
        return _four_bits(wish, facts, (16, 12), room, left, rest, guard="memory", limit=room, raised=raised)
    why = (
        f"4 bits in all layers would take {_gb(four)}: those that stand it best get weights of three values "
        "(method robuq)."
    )
    return _mixed(wish, facts, room, f"{room / 1e6:.3f}MB", left, why)


def _too_large(wish, facts):
    smallest = facts.at(2)
    needed = smallest + facts.room + SPARE
    enough = next((f" Take fits {size} GB." for size in CARDS if size * 2**30 >= needed), "")
    return (
        f"{wish}: the smallest this model can be made is {_gb(smallest)}, and with {_gb(facts.room)} to "
        f"sample at this size and {_gb(SPARE)} for the system it needs {_gb(needed)}.{enough} Or connect "
        "a smaller latent_image, or take smallest: ComfyUI then keeps a part in main memory."
    )


def _four_bits(wish, facts, calibration, size, *more, **guard):
    samples, steps, told = _calibration(facts, *calibration)
    method = FOUR if facts.components else FOUR_PLAIN
    runs = "" if facts.components else f" that this card has kernels for ({FOUR} is closer)"
    why = (FOUR_WHY.format(method, runs), told, *more, *_over(facts, size))
    return Choice(wish, method, samples, steps, _memory(facts), size, why=why, **guard)


def _over(facts, size) -> tuple[str, ...]:
    """A sentence where the model will not fit the card at hand whole."""
    if facts.cpu or size + facts.room + SPARE <= facts.card:
        return ()
    gib = next((size for size in reversed(CARDS) if size * 2**30 <= 1.05 * facts.card), CARDS[0])
    return (
        f"This card has {_gb(facts.card)}: with about {_gb(size)} of weights and {_gb(facts.room)} to sample "
        f"ComfyUI will keep a part in main memory, which is slower. The wish fits {gib} GB avoids that.",
    )


def _mixed(wish, facts, size, budget, *more):
    samples, steps, told = _calibration(facts, 16, 12)
    return Choice(wish, "", samples, steps, _memory(facts), size, budget=budget, why=(*more, told))


def _calibration(facts, samples, steps):
    """(runs, steps of each, a sentence)."""
    if facts.measured:
        return facts.measured, 0, f"Measured on the calibration given, of {facts.measured} example runs."
    samples, steps, slow = samples, min(steps, facts.steps), ""
    if facts.cpu:
        samples, steps = samples // 2, min(steps, 8)
        slow = ", fewer than with a card, since a CPU is slow"
    return samples, steps, f"{samples} example runs of {steps} steps to measure on{slow}."


def _memory(facts):
    """A quarter of what there is: the model samples beside the statistics. Of all, not of what is free just
    now: a stopped calibration goes on with the same passes only."""
    return min(MOST, max(LEAST, facts.card // 4))


def _layer_bytes(layer, bits) -> int:
    """Codes, scales, smoothing, low rank and bias; weight-only layers have 4 bits in groups always."""
    k, n, parts = layer.in_features, layer.out_features, len(layer.parts)
    bits = 4 if layer.weight_only else bits
    rank = min(RANK, k, n)
    scales = 2 * n * k // GROUP if bits == 4 else 2 * n * parts
    smooth = 0 if layer.weight_only else 2 * k
    return n * k * bits // 8 + scales + smooth + 2 * rank * (k + parts * n) + 2 * n


def statistics_bytes(layers: Iterable[Layer]) -> int:
    """Of a calibration's files, with second moments."""
    return sum(InputStatistics.nbytes(i.width, i.blocks) for i in inputs_of(layers))


def _gb(nbytes) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 5e7 else f"{nbytes / 1e6:.1f} MB"
