"""How long work shows where it is, and how long it will still take."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[Iterable[T], int], Iterable[T]]
"""Takes items and their number, hands them on, and shows a bar or raises an interrupt on the way."""

QUICK = 0.02  # seconds: what a run before has done takes no longer to be found again


def silent(items: Iterable[T], total: int) -> Iterable[T]:
    """The Progress that shows nothing."""
    return items


@dataclass
class Pace:
    """How fast work goes, in pieces of about the same length. done: pieces, those that a stopped run had kept
    among them; they count for nothing, nor do pieces at the beginning that took no time."""

    total: int
    done: int = 0
    clock: Callable[[], float] = time.monotonic
    _began: tuple[float, int] = field(init=False)
    _last: float = field(init=False)

    def __post_init__(self):
        self._last = self.clock()
        self._began = self._last, self.done

    def to(self, done: int):
        """`done` pieces are done now."""
        now, (_, before) = self.clock(), self._began
        if now - self._last < QUICK * (done - self.done) and self.done == before:
            self._began = now, done
        self._last, self.done = now, done

    def left(self) -> float | None:
        """Seconds for the rest; None as long as nobody knows."""
        began, before = self._began
        if self.done == before:
            return None
        return (self._last - began) / (self.done - before) * (self.total - self.done)


def duration(seconds: float) -> str:
    """E.g. "8 s", "3 min", "1 h 20 min"."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
