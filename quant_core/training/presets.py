"""What Nibble Quantize and `nibble quantize --training` train, by method."""

from dataclasses import dataclass, replace

from .reconstruct import TrainConfig


@dataclass(frozen=True)
class Preset:
    """blocks: how each block is trained as soon as it is quantized; distill: how runs of `span` blocks are
    after that, the last of them to the network's prediction; None to leave one out."""

    blocks: TrainConfig | None
    distill: TrainConfig | None
    span: int = 4

    @property
    def adaptive(self) -> bool:
        """Whether it wants the blocks' gains: rates are a block's, a run of several has the config's."""
        return self.blocks is not None and self.blocks.adaptive


UNTRAINED = Preset(None, None)
TRANSFORMS = TrainConfig(("transform", "smooth", "clip"), steps=100, rate=5e-3, calls=3, coherence=1.0)
# At 1e-2, with 8 calibration runs, the small FLUX's pictures lost 3.8 dB: the loss went to half of where it
# began, that of held-out calls nowhere.
TERNARY = TrainConfig(
    ("scale", "threshold", "low_rank", "clip", "bias"), steps=120, rate=2e-3, calls=4, coherence=4.0
)
SPLIT = {
    "standard": Preset(None, TRANSFORMS),
    "best": Preset(TRANSFORMS, replace(TRANSFORMS, steps=300, affine=True)),
}
PRESETS = {
    "splitquant": SPLIT,  # smoothing and clips alone; held-out inputs kept the start where it was tried
    "splitquant_4": SPLIT,
    "robuq": {
        "standard": Preset(None, TERNARY),
        "best": Preset(TERNARY, replace(TERNARY, steps=400)),
    },
}
NAMES = ("none", "standard", "best")


def preset(method: str, name: str) -> Preset:
    """The preset `name` of a method. Raises ValueError where there is no such preset or the method has no
    training."""
    if name not in NAMES:
        raise ValueError(f"unknown training {name!r}. Choose of: {', '.join(NAMES)}.")
    if name == "none":
        return UNTRAINED
    if method not in PRESETS:
        raise ValueError(f"method {method} has no training; {', '.join(PRESETS)} have. Set training to none.")
    return PRESETS[method][name]
