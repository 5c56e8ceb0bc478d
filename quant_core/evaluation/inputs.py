"""Inputs of layers by the kinds that trained networks have, seeded, for judging methods layer by layer.

Correlated Gaussian tokens hide what counts: GPTQ is worth 0.2 dB on them and 2 to 3 dB where channels are
correlated as in trained layers.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _randn(*shape, seed):
    """The same for every call: what belongs to the layer and not to its tokens."""
    return torch.randn(*shape, generator=_generator(seed))


def _base(count, width, g):
    shared = torch.randn(count, 64, generator=g) @ _randn(64, width, seed=5) / 8
    return torch.randn(count, width, generator=g) + 0.7 * shared


def heavy_tails(count: int, width: int, g: torch.Generator) -> torch.Tensor:
    """Student's t with 3 degrees of freedom: every channel has rare large values."""
    chi = (
        torch.randn(
            count,
            width,
            3,
            generator=g,
        )
        .square()
        .sum(-1)
    )
    return torch.randn(count, width, generator=g) / (chi / 3).sqrt() * (0.5 * _randn(width, seed=2)).exp()


def massive_tokens(count: int, width: int, g: torch.Generator) -> torch.Tensor:
    """One token in 200 holds two channels of 300 times the rest, as FLUX's text stream does."""
    x = _base(count, width, g) * (0.4 * _randn(width, seed=2)).exp()
    rows = (torch.rand(count, generator=g) < 0.005).nonzero()[:, 0]
    for channel, size in ((width // 150, 300), (width // 4, -180)):
        x[rows, channel] = size * (1 + 0.1 * torch.randn(len(rows), generator=g))
    return x


def token_norms(count: int, width: int, g: torch.Generator) -> torch.Tensor:
    """Norms of tokens over two decades: text tokens beside image tokens."""
    sizes = 10 ** (2 * torch.rand(count, 1, generator=g))
    return _base(count, width, g) * (0.6 * _randn(width, seed=2)).exp() * sizes


def shifted(count: int, width: int, g: torch.Generator) -> torch.Tensor:
    """Behind adaLN: a scale and a shift for each 256 tokens, and a shift that dwarfs the rest in an eighth of
    the channels."""
    x, picture = F.layer_norm(_base(count, width, g), (width,)), torch.arange(count) // 256
    pictures = int(picture.max()) + 1
    scale = 0.5 * torch.randn(pictures, width, generator=g) + (0.5 * _randn(width, seed=2)).exp()
    large = 4 * _randn(width, seed=3) * (torch.rand(width, generator=_generator(4)) < 0.125)
    shift = large + 0.3 * torch.randn(pictures, width, generator=g)
    return x * scale[picture] + shift[picture]


def after_gelu(count: int, width: int, g: torch.Generator) -> torch.Tensor:
    """The hidden layer of an MLP, with GELU's tanh form."""
    x = 1.5 * _base(count, width, g) * (0.5 * _randn(width, seed=2)).exp() + 0.5 * _randn(width, seed=3)
    return F.gelu(x, approximate="tanh")


def gated(count: int, width: int, g: torch.Generator) -> torch.Tensor:
    """The hidden layer of a gated MLP: GELU of one half times the other."""
    return F.gelu(_base(count, width, g)) * _base(count, width, g) * (0.5 * _randn(width, seed=2)).exp()


def falling_spectrum(count: int, width: int, g: torch.Generator) -> torch.Tensor:
    """Standard deviations of the principal components fall as 1 / i^0.7."""
    basis = torch.linalg.qr(_randn(width, width, seed=2))[0]
    spread = torch.arange(1, width + 1).float() ** -0.7
    return (
        torch.randn(count, width, generator=g)
        * spread
        @ basis
        * width**0.5
        * (0.6 * _randn(width, seed=3)).exp()
    )


Kind = Callable[[int, int, torch.Generator], torch.Tensor]
# {kind: (tokens (count, width) fp32 of a generator, the layer's in-channels and out-channels)}
KINDS: dict[str, tuple[Kind, int, int]] = {
    "heavy tails": (heavy_tails, 1152, 1152),
    "massive tokens": (massive_tokens, 1152, 1152),
    "token norms": (token_norms, 1152, 1152),
    "adaLN shift": (shifted, 1152, 1152),
    "GELU": (after_gelu, 1536, 512),
    "gated GELU": (gated, 1152, 1152),
    "falling spectrum": (falling_spectrum, 1152, 1152),
    "falling spectrum, wide": (falling_spectrum, 3072, 256),
}
