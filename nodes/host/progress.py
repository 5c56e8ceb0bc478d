"""Progress and interruption, as ComfyUI wants them: the bar and a text on the node, lines in the server's
log."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from ...quant_core.store.progress import Pace, Progress, duration

Item = TypeVar("Item")
EVERY = 1.0  # seconds between two texts


class Shown:
    """The bar and the text on the node that runs.

    what: e.g. "Calibrating"; unit: what is counted, e.g. "steps". Nothing is shown before `begin`.
    """

    def __init__(self, what: str, unit: str) -> None:
        self.what, self.unit = what, unit
        self._kept, self._said = 0, 0.0
        self._pace = Pace(0)

    @property
    def begun(self) -> bool:
        return self._pace.total > 0

    def begin(self, total: int, kept: int = 0) -> None:
        """Work of `total` pieces, of which a stopped run has kept some: there the bar begins."""
        self._kept, self._pace = kept, Pace(total, kept)
        self._bar = comfy.utils.ProgressBar(total)
        if kept:
            logging.info(f"Nibble: {self.what.lower()} goes on: {self._kept_text()}")
        self._bar.update_absolute(kept, total)
        self._say(force=True)

    def to(self, done: int, preview: tuple | None = None) -> None:
        """`done` pieces are done, those that were kept among them. preview: a picture as ComfyUI's previewers
        give it."""
        done = min(max(done, self._kept), self._pace.total)
        self._pace.to(done)
        self._bar.update_absolute(done, self._pace.total, preview)
        self._say(force=done == self._pace.total)

    def add(self, pieces: int, preview: tuple | None = None) -> None:
        """So many more are done."""
        self.to(self._pace.done + pieces, preview)

    def _kept_text(self) -> str:
        return f"{self._kept} of {self._pace.total} {self.unit} kept"

    def _say(self, force) -> None:
        if not force and time.monotonic() - self._said < EVERY:
            return
        self._said = time.monotonic()
        pace, left = self._pace, self._pace.left()
        more = "" if left is None or not pace.total - pace.done else f", about {duration(left)} left"
        lines = [f"{self.what}: {pace.done} of {pace.total} {self.unit}{more}"]
        say("\n".join([*lines, self._kept_text()] if self._kept else lines))


def say(text: str) -> None:
    """Shows a text on the node that runs; nothing where ComfyUI runs no graph."""
    if (context := get_executing_context()) is None:
        return
    from server import PromptServer  # of ComfyUI, which has none outside of its own process

    server = PromptServer.instance
    server.send_progress_text(text, context.node_id, server.client_id)


def shown(what: str = "", unit: str = "layers", on: Shown | None = None) -> Progress:
    """A Progress with time left; raises ComfyUI's interrupt between two items. on: where `begin` was called
    already, with what is kept; the items are all of them then, what is kept first."""

    def steps_of(items: Iterable[Item], total: int) -> Iterator[Item]:
        bar = on or Shown(what, unit)
        if on is None:
            bar.begin(total)
        for done, item in enumerate(items, 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield item
            bar.to(done)

    return steps_of


def steps(items: Iterable[Item], total: int) -> Iterator[Item]:
    """Yields the items, moving the node's progress bar; raises ComfyUI's interrupt between two of them."""
    bar = comfy.utils.ProgressBar(total)
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        bar.update(1)


@contextmanager
def logged(node: str, what: str) -> Iterator[None]:
    """A line in the server's log when a long job begins, and one when it ends, with how long it took."""
    logging.info(f"{node}: begins: {what}")
    started = time.monotonic()
    try:
        yield
    except BaseException:
        logging.info(f"{node}: stopped after {duration(time.monotonic() - started)}: {what}")
        raise
    logging.info(f"{node}: done in {duration(time.monotonic() - started)}: {what}")
