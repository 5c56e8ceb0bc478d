"""Progress and interruption, as ComfyUI wants them."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import comfy.model_management
import comfy.utils

Item = TypeVar("Item")


def steps(items: Iterable[Item], total: int) -> Iterator[Item]:
    """Yields the items, moving the node's progress bar; raises ComfyUI's interrupt between two of them."""
    bar = comfy.utils.ProgressBar(total)
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        bar.update(1)
