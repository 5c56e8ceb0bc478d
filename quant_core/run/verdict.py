"""How close a quantized model is to the original, in a sentence and a colour."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, isfinite
from typing import Literal

from ...kernels.operator.errors import plain, shortened
from ..layer.row import Row
from .sizes import sizes

# By the worst layer: it separates the pictures of the small FLUX (`nibble demo`, 24 of them against full
# precision), where means do not, since weight-only layers of 40 dB lift them. Worst layer 24 to 27 dB: 35 to
# 38 dB of pictures; 18 to 20: 34; 16 to 17: 30, the same picture with other details; 9 and below: 8 to 23,
# grain and noise. svdquant_r's layers of FLUX's kind, with outliers, lie at 17.5 to 20 dB, and green has to
# take them in.
VERY_CLOSE, CLOSE, FAR = 24.0, 17.0, 10.0
NAMED = 3  # layers that an advice names


@dataclass(frozen=True)
class Verdict:
    """level: the colour. sentence: for a person, without a full stop. advice: what to do, a sentence each,
    none where it is green."""

    level: Literal["green", "amber", "red"]
    sentence: str
    advice: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """The level for those who see no colour."""
        return {"green": "Good", "amber": "Check", "red": "Bad"}[self.level]

    @property
    def text(self) -> str:
        """All of it, a line each."""
        return "\n".join([f"{self.word}: {self.sentence}.", *self.advice])


def verdict(rows: list[Row], shapes: Mapping[str, tuple[int, ...]]) -> Verdict:
    """The Verdict on a model by the rows of its report. shapes: {key: shape} of the whole model as if nothing
    were quantized. Errors are those of the layers' outputs on tokens that no fit has seen; a model without
    them is amber: nobody has looked."""
    facts = ", ".join(filter(None, [_size(rows, shapes), _kept(rows)]))
    measured = sorted(
        (r.sqnr_db, r.name) for r in rows if r.quantized and r.sqnr_db is not None
    )  # the worst first
    if not any(r.quantized for r in rows):
        return Verdict("red", f"Nothing was quantized: {facts}", (_NOTHING,))
    if not measured:
        return Verdict("amber", f"Not measured, nobody knows how close it is: {facts}", (_NOT_MEASURED,))
    worst, _ = measured[0]
    said = f"worst layer {_db(worst)} ({percent(worst)} off), {facts}"
    if worst >= CLOSE:
        close = "Very close" if worst >= VERY_CLOSE else "Close"
        return Verdict("green", f"{close} to the original: {said}")
    low = [(db, name) for db, name in measured if db < CLOSE]
    advice = (_repair(low, len(measured)), *_ADVICE)
    if worst >= FAR:
        return Verdict("amber", f"Mostly close to the original, compare a picture: {said}", advice)
    return Verdict("red", f"Far from the original, expect noise in pictures: {said}", advice)


def percent(db: float) -> str:
    """How far off an output of this SQNR is, the root of the mean square: 20 dB are 10 %."""
    share = 100 * 10 ** (-max(db, -40.0) / 20)
    return f"{share:.0f} %" if share >= 1 else f"{share:.1g} %"


_NOTHING = "Connect the full-precision model, and see in the report why each layer was left as it is."
_NOT_MEASURED = (
    "It was made without example runs of the model. Calibrate first (Nibble Calibrate, or the wish balanced "
    "of Nibble Quantize for My Card): 4-bit models then come out closer, and the error is measured."
)
_ADVICE = (
    "Or calibrate on more samples, 16 to 64, with prompts like those you use.",
    "Or take the wish best in Nibble Quantize for My Card: it does both.",
)


def _db(db: float) -> str:
    """Rounded down, as the levels are told apart; numbers of a file may be anything."""
    return f"{floor(db)} dB" if isfinite(db) else ("exact" if db > 0 else "without a number")


def _repair(low, count) -> str:
    names = ", ".join(f"{shortened(plain(name))} at {_db(db)}" for db, name in low[:NAMED])
    more = f" and {len(low) - NAMED} more" if len(low) > NAMED else ""
    return (
        f"Below {CLOSE:.0f} dB: {len(low)} of {count} layers ({names}{more}). Nibble Guard puts such layers "
        "into 8 or 16 bit, for a little more memory."
    )


def _size(rows, shapes) -> str:
    after, before = sizes(rows, shapes)
    scale, unit = (1e9, "GB") if before >= 1e9 else (1e6, "MB")
    return f"{after / scale:.1f} {unit} instead of {before / scale:.1f}"


def _kept(rows) -> str:
    """Of the layers that were planned."""
    if not (kept := sum(not r.quantized and bool(r.block) for r in rows)):
        return ""
    return f"{kept} layer{'s' * (kept > 1)} kept in 16 bit"
