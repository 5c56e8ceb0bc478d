"""Any model with linear layers in repeated blocks, by rule and by what a calibration observed: a new architecture needs no code.

Rules, from names and shapes alone: a block is the outermost numbered module that repeats with several linear layers; what lies outside of
blocks (embedders, first and last projections) stays in 16 bit, and so do embeddings within; modulation is weight-only, as in FLUX
(SVDQuant, section 5). A calibration then confirms: which layers are called and in which order, which share an input (the hooked
tensor is the same), which see one row a picture (weight-only) and which read the output of a GELU (nothing below -0.17).
After quantization a layer that is much worse than the others goes back to 16 bit.
"""

import re
import statistics
from dataclasses import dataclass, replace

from ..spec import GELU_SHIFT
from .base import Family, Layer, Part, natural
from .pointwise import keeps_16_bit, spatial_of

_MODULATION = re.compile(
    r"(^|[._])((\w+_)?mod(ulation)?(_\w+)?|ada_?(ln|norm)\w*|scale_shift\w*|norm\w*\.(linear|lin|proj)|emb_layers)([._]|$)", re.I
)
_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|pos_emb\w*|emb|rope\w*|router)([._]|$)", re.I)
LEAST = 3  # linear layers that make a repeated module a block
FEW_ROWS = 8  # rows a call up to which x is one vector a picture (both halves of a batch of 4)
FAR_BELOW = 12.0  # dB below the median layer


@dataclass(frozen=True)
class Generic(Family):
    """See the module. `observe`: its layers want an Observation before statistics are planned."""

    def matches(self, shapes) -> bool:
        return bool(self.layers(shapes))

    def matches_diffusers(self, shapes) -> bool:
        return False

    def layers(self, shapes: dict[str, tuple[int, ...]]) -> list[Layer]:
        """The layers to quantize, blocks and layers in natural order of their names."""
        linear = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2 and min(s) >= 64}
        found = []
        for name, block in _blocks(linear).items():
            rest, (n, k) = name.removeprefix(f"{block}."), linear[name]
            weight_only = bool(_MODULATION.search(rest))
            if weight_only or not _EMBEDDING.search(rest):
                found.append(Layer(name, block, k, n, (Part(0, k),), name, weight_only))
        found += _convolutions(shapes, {layer.block for layer in found})
        return sorted(found, key=lambda layer: natural(layer.name))


def _convolutions(shapes, blocks) -> list[Layer]:
    """1x1 convolutions within the blocks that the linear layers make."""
    found = []
    for key, shape in shapes.items():
        name = key.removesuffix(".weight")
        if name == key or not spatial_of(shape) or min(shape[:2]) < 64 or keeps_16_bit(name) or _EMBEDDING.search(name):
            continue
        pieces = name.split(".")
        block = next((b for i in range(1, len(pieces)) if (b := ".".join(pieces[:i])) in blocks), None)
        if block is not None:
            found.append(Layer(name, block, shape[1], shape[0], (Part(0, shape[1]),), name, False, spatial_of(shape)))
    return found


def _blocks(linear) -> dict[str, str]:
    """{layer: its block}. Siblings of a block share at least half of their layers' names; a lone one needs a name that says block or layer."""
    members = {}
    for name in linear:
        pieces = name.split(".")
        for i, piece in enumerate(pieces[:-1]):
            if piece.isdigit() and i:
                members.setdefault(".".join(pieces[: i + 1]), set()).add(".".join(pieces[i + 1 :]))
    stems = {}
    for prefix, rests in members.items():
        if len(rests) >= LEAST:
            stems.setdefault(prefix.rpartition(".")[0], []).append(rests)
    repeated = {stem for stem, sets in stems.items() if _alike(sets) or re.search(r"block|layer", stem, re.I)}
    out = {}
    for prefix in sorted(
        (p for p, r in members.items() if len(r) >= LEAST and p.rpartition(".")[0] in repeated), key=lambda p: p.count(".")
    ):
        for rest in members[prefix]:
            out.setdefault(f"{prefix}.{rest}", prefix)  # the outermost comes first
    return out


def _alike(sets) -> bool:
    return any(2 * len(a & b) >= len(a | b) for i, a in enumerate(sets) for b in sets[:i])


def measured(layers: list[Layer], calibration) -> list[Layer]:
    """`layers` as the calibration observed them, in the order of the forward pass; unchanged where it observed nothing of the kind.

    Layers that were never called are left out: they stay in 16 bit.
    """
    seen = calibration.meta.get("observed") if calibration is not None else None
    if not seen:
        return layers
    return [after_gelu(layer, calibration) for layer in observed(layers, seen)]


def observed(layers: list[Layer], seen: dict) -> list[Layer]:
    """The same of an Observation's JSON alone: order of blocks and layers, shared inputs, weight-only; without layers of many rows that
    modulate."""
    by_name, out = {layer.name: layer for layer in layers}, []
    for name in seen["order"]:
        if (layer := by_name.get(name)) is None:
            continue
        few = seen["rows"][name] <= FEW_ROWS
        if layer.weight_only and not few:
            continue  # modulation of single tokens: sensitive, and W4A16 is slow for many rows
        out.append(replace(layer, weight_only=few, input=seen["shared"].get(name, name)))
    first = {}
    for layer in out:
        first.setdefault(layer.block, len(first))
    return sorted(out, key=lambda layer: first[layer.block])


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
    if len(measured) < 2 * LEAST:
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
