"""What the sweep knows of a model class: data alone, one entry a class."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Entry:
    """A class of `comfy.supported_models` and what makes a tiny instance of it run.

    full: its `unet_config` at full width, as ComfyUI's detection has it for the published checkpoint; what is
    the network's own default may be left out. device: where the network is made so. narrow: what the tiny
    instance has instead. latent: shape of the latent, or shapes of the streams of a nested one. text:
    (tokens, width) of the text encoder's output. conds(rand): what else stands in the conditioning, where
    rand(*shape) is seeded noise. outside: shapes of tensors outside of the network that the class takes from
    its checkpoint. variant: tells apart several entries of one class. note: a sentence for docs/models.md.
    prepare(network): puts right what random weights alone leave wrong. replace: {name within ComfyUI:
    function of what stands there that gives what shall stand there}, for widths that no argument of a
    constructor narrows. gain: of the random layers, smaller where the network multiplies what they give.
    error: bound of the network's relative error at 4 bits. cosine: what the LoRA's effect reaches at least,
    against that on full precision; five relatives of SDXL and SVD came to 0.934 to 0.949 with the sweep's
    short search, everything else lies above 0.95.
    """

    name: str
    full: dict
    narrow: dict
    latent: tuple
    text: tuple[int, int] | None = (10, 64)
    conds: Callable = lambda rand: {}
    outside: dict = field(default_factory=dict)
    variant: str = ""
    note: str = ""
    prepare: Callable = lambda network: None
    replace: dict = field(default_factory=dict)
    device: str = "meta"
    gain: float = 0.7
    error: float = 0.3
    cosine: float = 0.95

    @property
    def id(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def rand(self) -> Callable:
        """A function that gives seeded noise of a shape, another one at each call."""
        g = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        return lambda *shape: torch.randn(*shape, generator=g)
