"""Which linear layers are quantized where no map names them, from their names and shapes alone.

A block is the outermost numbered module that repeats with several linear layers; a list of modules with one
large layer each counts too (HiDream's projections of the text for each block). What lies outside (embedders,
first and last projections) stays in 16 bit, and so do embeddings and routers within; modulation is
weight-only, as in FLUX (SVDQuant, section 5).
"""

import re
from collections import Counter
from collections.abc import Mapping

from .layer import IN_BLOCK, SHARED, Layer, Part, natural
from .pointwise import keeps_16_bit, spatial_of

MODULATION = re.compile(
    r"(^|[._])((\w+_)?mod(ulation)?(_\w+)?|ada_?(ln|norm)\w*|scale_shift\w*|norm\w*\.(linear|lin|proj)|emb_layers)([._]|$)",
    re.I,
)
EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|pos_emb\w*|emb|rope\w*|router)([._]|$)", re.I)
FINAL = re.compile(r"(^|[._])(final\w*|last\w*|head|norm_out)([._]|$)", re.I)
SMALLEST = 64  # in- and out-channels below which a layer stays in 16 bit
LEAST = 2  # linear layers that make a repeated module a block: FLUX.2's one-stream blocks have two
# One of so many layers reads what counts as a width of the model; LTX-2 has one for video and one for sound.
WIDTH = 5
LONE = 4  # modules of one layer each that make a list, where its name does not say block or layer


def linear_layers(shapes) -> dict[str, tuple[int, int]]:
    """{layer: (out-channels, in-channels)} of what may be a linear layer."""
    return {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2}


def in_blocks(shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
    """The layers within repeated modules, in natural order of their names."""
    linear = {name: s for name, s in linear_layers(shapes).items() if min(s) >= SMALLEST}
    found = []
    for name, block in _blocks(linear).items():
        rest, (n, k) = name.removeprefix(f"{block}."), linear[name]
        weight_only = bool(MODULATION.search(rest))
        if weight_only or not EMBEDDING.search(rest):
            found.append(Layer(name, block, k, n, (Part(0, k),), name, weight_only, IN_BLOCK))
    found += _convolutions(shapes, {layer.block for layer in found})
    return sorted(found, key=lambda layer: natural(layer.name))


def _convolutions(shapes, blocks) -> list[Layer]:
    """1x1 convolutions within the blocks that the linear layers make."""
    found = []
    for key, shape in shapes.items():
        name = key.removesuffix(".weight")
        if (
            name == key
            or not (spatial := spatial_of(shape))
            or min(shape[:2]) < SMALLEST
            or keeps_16_bit(name)
            or EMBEDDING.search(name)
        ):
            continue
        pieces = name.split(".")
        block = next((b for i in range(1, len(pieces)) if (b := ".".join(pieces[:i])) in blocks), None)
        if block is not None:
            parts = (Part(0, shape[1]),)
            found.append(Layer(name, block, shape[1], shape[0], parts, name, rule=IN_BLOCK, spatial=spatial))
    return found


def shared_modulation(shapes: Mapping[str, tuple[int, ...]], layers: list[Layer]) -> list[Layer]:
    """Layers outside of the blocks that make shifts, scales and gates for all of them: from a width of the
    model to 3, 6, 9 ... times it, or to 4 and more times where the name says modulation (two shifts and two
    scales of LTX-2's attention between video and sound). layers: those within blocks."""
    modulates = lambda name, n, k: n % (3 * k) == 0 or (n % k == 0 and n >= 4 * k and MODULATION.search(name))
    counts = Counter(layer.in_features for layer in layers if not layer.weight_only)
    widths = {width for width, count in counts.items() if WIDTH * count >= len(layers)}
    names = {layer.name for layer in layers}
    inside = tuple({f"{layer.block}." for layer in layers})
    return [
        Layer(name, layers[0].block, k, n, (Part(0, k),), name, True, SHARED)
        for name, (n, k) in linear_layers(shapes).items()
        if name not in names
        and not name.startswith(inside)
        and k in widths
        and modulates(name, n, k)
        and not FINAL.search(name)
    ]


def _blocks(linear) -> dict[str, str]:
    """{layer: its block}. Siblings of a block share at least half of their layers' names; a lone one needs a
    name that says block or layer."""
    members: dict[str, set[str]] = {}
    for name in linear:
        pieces = name.split(".")
        for i, piece in enumerate(pieces[:-1]):
            if piece.isdigit() and i:
                members.setdefault(".".join(pieces[: i + 1]), set()).add(".".join(pieces[i + 1 :]))
    stems: dict[str, dict[str, set[str]]] = {}
    lists: dict[tuple, list[str]] = {}
    for prefix, rests in members.items():
        stem = prefix.rpartition(".")[0]
        if len(rests) > LEAST or (
            len(rests) == LEAST and not EMBEDDING.search(stem) and _returns(linear, prefix, rests)
        ):
            stems.setdefault(stem, {})[prefix] = rests
        elif len(rests) == 1 and not EMBEDDING.search(prefix):
            rest = next(iter(rests))
            lists.setdefault((stem, rest, linear[f"{prefix}.{rest}"]), []).append(prefix)
    says = lambda stem: re.search(r"block|layer", stem, re.I)
    found = [
        p for stem, blocks in stems.items() if _alike(list(blocks.values())) or says(stem) for p in blocks
    ]
    found += [
        p
        for (stem, *_), prefixes in lists.items()
        if len(prefixes) >= (LEAST if says(stem) else LONE)
        for p in prefixes
    ]
    out: dict[str, str] = {}
    for prefix in sorted(found, key=lambda p: p.count(".")):
        for rest in members[prefix]:
            out.setdefault(f"{prefix}.{rest}", prefix)  # the outermost comes first
    return out


def _returns(linear, prefix, rests) -> bool:
    """Whether what a module of two layers reads is as wide as something that it makes: a block adds to its
    input, an embedder widens it."""
    shapes = [linear[f"{prefix}.{rest}"] for rest in rests]
    return min(k for _, k in shapes) in {n for n, _ in shapes}


def _alike(sets) -> bool:
    return any(2 * len(a & b) >= len(a | b) for i, a in enumerate(sets) for b in sets[:i])
