"""What Nibble Quantize and `nibble quantize --training` train, by method."""

from dataclasses import dataclass

from ..calibration.reconstruct import TrainConfig


@dataclass(frozen=True)
class Preset:
    """blocks: how each block is trained as soon as it is quantized; distill: how runs of `span` blocks are after that, the last of them
    to the network's prediction; None to leave one out."""

    blocks: TrainConfig | None
    distill: TrainConfig | None
    span: int = 4


UNTRAINED = Preset(None, None)
PRESETS = {
    "splitquant": {
        "standard": Preset(TrainConfig(("transform", "smooth"), steps=60, rate=1e-3), None),
        "best": Preset(
            TrainConfig(("transform", "smooth"), steps=150, rate=1e-3), TrainConfig(("scale", "bias", "rounding"), steps=150, rate=5e-3)
        ),
    },
    "robuq": {
        "standard": Preset(None, TrainConfig(("scale", "threshold", "low_rank", "clip", "bias"), steps=120, rate=1e-2)),
        "best": Preset(None, TrainConfig(("scale", "threshold", "low_rank", "clip", "bias", "rounding"), steps=400, rate=1e-2)),
    },
}
NAMES = ("none", "standard", "best")


def preset(method: str, name: str) -> Preset:
    """The preset `name` of a method. Raises ValueError where there is no such preset or the method has no training."""
    if name not in NAMES:
        raise ValueError(f"unknown training {name!r}. Choose of: {', '.join(NAMES)}.")
    if name == "none":
        return UNTRAINED
    if method not in PRESETS:
        raise ValueError(f"method {method} has no training; {' and '.join(PRESETS)} have. Set training to none.")
    return PRESETS[method][name]
