"""Any model with linear layers in repeated blocks, by rule and by what a calibration observed: a new architecture needs no code.

The rules (`rules`) go by names and shapes. A calibration then confirms what they found, here and beside a family's map: which layers are
called and in which order, which share an input (the hooked tensor is the same), which see one row a picture (weight-only) and which read
the output of a GELU (nothing below -0.17). After quantization a layer that is much worse than the others goes back to 16 bit.
"""

import statistics
from dataclasses import dataclass, replace

from ..spec import GELU_SHIFT
from .base import Family
from .layer import SHARED, Layer, by_block
from .rules import in_blocks

FEW_ROWS = 8  # rows a call up to which x is one vector a picture (both halves of a batch of 4)
FAR_BELOW = 12.0  # dB below the median layer
ENOUGH = 6  # layers that make a median


@dataclass(frozen=True)
class Generic(Family):
    """See the module. It has no map: the rules find all of its layers."""

    def matches(self, shapes) -> bool:
        return bool(self.layers(shapes))

    def matches_diffusers(self, shapes) -> bool:
        return False

    def mapped(self, shapes: dict[str, tuple[int, ...]]) -> list[Layer]:
        """The layers within repeated blocks."""
        return in_blocks(shapes)


def measured(layers: list[Layer], calibration) -> list[Layer]:
    """`layers` as the calibration observed them, in the order of the forward pass, without those that `why_left_out` has a reason for."""
    kept = [layer for layer in layers if not why_left_out(layer, calibration)]
    seen = None if calibration is None else calibration.meta.get("observed")
    return [after_gelu(layer, calibration) if layer.rule else layer for layer in observed(kept, seen)] if seen else kept


def why_left_out(layer: Layer, calibration) -> str:
    """Why a layer that the rules found stays in 16 bit, "" where it is quantized.

    Modulation that all blocks share wants a calibration: rounded to nearest it took a fourth of a small FLUX.2's accuracy (the latents'
    error 0.37 instead of 0.29), with a calibration a twentieth.
    """
    if not layer.rule:
        return ""
    if calibration is None:
        return "modulation that all blocks share: quantized with a calibration only" if layer.rule == SHARED else ""
    if seen := calibration.meta.get("observed"):
        return _unlike(layer, seen)
    return "" if layer.input in calibration.names else "the calibration holds no statistics of it"


def _unlike(layer, seen) -> str:
    """What an Observation has against the guess of the rules."""
    if layer.name not in seen["rows"]:
        return "never called during the calibration"
    if layer.weight_only and seen["rows"][layer.name] > FEW_ROWS:  # sensitive, and W4A16 is slow for many rows
        return f"modulation of single tokens, {seen['rows'][layer.name]} rows a call"
    return ""


def observed(layers: list[Layer], seen: dict) -> list[Layer]:
    """Layers of a map as they are; the others as an Observation's JSON has them: order of blocks and layers, shared inputs, weight-only;
    without those never called, and without layers of many rows that modulate."""
    by_map = [layer for layer in layers if not layer.rule]
    by_rule = [
        replace(layer, weight_only=seen["rows"][layer.name] <= FEW_ROWS, input=seen["shared"].get(layer.name, layer.name))
        for layer in layers
        if layer.rule and not _unlike(layer, seen)
    ]
    place = {name: i for i, name in enumerate(seen["order"])}
    return by_block(by_map + sorted(by_rule, key=lambda layer: place[layer.name]))


def after_gelu(layer: Layer, calibration) -> Layer:
    """The layer with its input marked as a GELU's output where no held-out token is below -GELU_SHIFT and some go beyond 1."""
    if layer.weight_only or layer.input not in calibration.names:
        return layer
    tokens = calibration.get(layer.input, second_moments=False).tokens
    if tokens.numel() and tokens.min() >= -GELU_SHIFT and tokens.max() > 1:
        return replace(layer, parts=tuple(replace(part, after_gelu=True) for part in layer.parts))
    return layer


def sensitive(rows) -> dict[str, str]:
    """{layer: why} of report rows whose measured SQNR lies far below the median: what no rule about names could know."""
    measured = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    if len(measured) < ENOUGH:
        return {}
    limit = statistics.median(measured) - FAR_BELOW
    low = {row.name: row.sqnr_db for row in rows if row.sqnr_db is not None and row.sqnr_db < limit}
    return {name: f"16 bit: {db:.1f} dB, the median layer has {limit + FAR_BELOW:.1f}" for name, db in low.items()}


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
