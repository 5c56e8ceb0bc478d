"""What is quantized: linear layers and the parts of their in-channels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """In-channels start..stop of a layer that are quantized on their own. after_gelu: x >= -0.17 there."""

    start: int
    stop: int
    after_gelu: bool = False


@dataclass(frozen=True)
class Layer:
    """A linear layer to quantize.

    name: the module, without ".weight". block: the transformer block it belongs to. input: the layer whose
    input it shares (its own name, mostly); statistics are kept once for each input. weight_only: W4A16. rule:
    what found it, "" for a family's map; IN_BLOCK and SHARED are guesses from names and shapes, which a
    calibration confirms. spatial: as in LinearSpec, for 1x1 convolutions.
    """

    name: str
    block: str
    in_features: int
    out_features: int
    parts: tuple[Part, ...]
    input: str
    weight_only: bool = False
    rule: str = ""
    spatial: int = 0


IN_BLOCK = "block"  # within a repeated module
SHARED = "shared"  # modulation that all blocks share: one row a picture, known only from a calibration


def natural(name: str) -> list:
    """A sort key under which blocks.10 comes after blocks.9."""
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in name.split(".")]


def by_block(layers: list[Layer]) -> list[Layer]:
    """The layers of a block one behind the other, blocks in the order in which they first come."""
    first: dict[str, int] = {}
    for layer in layers:
        first.setdefault(layer.block, len(first))
    return sorted(layers, key=lambda layer: first[layer.block])
