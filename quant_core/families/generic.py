"""Any model with linear layers in repeated blocks, by rule and by what a calibration observed: a new
architecture needs no code.

The rules (`rules`) go by names and shapes. A calibration then confirms what they found, here and beside a
family's map: which layers are called and in which order, which share an input (the hooked tensor is the
same), which see one row a picture (weight-only) and which read the output of a GELU (nothing below -0.17).
After quantization a layer that is much worse than the others goes back to 16 bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .base import Family
from .layer import Layer
from .rules import in_blocks


@dataclass(frozen=True)
class Generic(Family):
    """See the module. It has no map: the rules find all of its layers."""

    def matches(self, shapes) -> bool:
        return bool(self.layers(shapes))

    def matches_diffusers(self, shapes) -> bool:
        return False

    def mapped(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
        """The layers within repeated blocks."""
        return in_blocks(shapes)


GENERIC = Generic(
    name="generic",
    title="Generic",
    block="",
    rules=(),
    signature=(),
    diffusers_signature=(),
    diffusers=lambda shapes: {},
    diffusers_class="",
    chain=False,  # nobody said so
)
