"""What stands in front of a linear layer and can be computed inside its activation quantizer."""

from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, layer_norm

from .plan import alike

NONE, GELU, LAYERNORM = 0, 1, 2
NOTHING = (NONE, None, None, 0.0)


class Prologue:
    """Called, it is the plain PyTorch version on x (M, K). keeps_zero: a channel of zeros stays one, and
    changes no other."""

    keeps_zero = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def fits(self, spec) -> bool:
        """Whether the quantizer can compute it for this layer."""
        return True

    def operands(self, columns: slice) -> tuple:
        """(kind, scale, shift, eps) for the quantizer of these in-channels, as in NOTHING."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gelu(Prologue):
    """GELU with the tanh approximation."""

    keeps_zero = True

    def __call__(self, x):
        return gelu(x, approximate="tanh")

    def operands(self, columns):
        return GELU, None, None, 0.0


@dataclass(frozen=True, eq=False)
class LayerNormModulate(Prologue):
    """(1 + scale) LayerNorm(x) + shift, without affine weights. scale, shift (batches, K) in the dtype of x,
    M / batches tokens each."""

    scale: torch.Tensor
    shift: torch.Tensor
    eps: float = 1e-6

    def __call__(self, x):
        normed = layer_norm(x, x.shape[-1:], eps=self.eps).unflatten(0, (self.scale.shape[0], -1))
        return torch.addcmul(self.shift[:, None], normed, 1 + self.scale[:, None]).flatten(0, 1)

    def fits(self, spec):
        # The mean needs the whole row: a launch sees the parts that are alike, a program with a learned
        # transform one of them.
        return len(spec.parts) == 1 or (
            len({alike(p) for p in spec.parts}) == 1 and not spec.parts[0].kronecker
        )

    def operands(self, columns):
        return LAYERNORM, self.scale[:, columns], self.shift[:, columns], self.eps


def restored(kind, scale, shift, eps) -> Prologue | None:
    """The Prologue whose `operands` these are."""
    if kind == NONE:
        return None
    return Gelu() if kind == GELU else LayerNormModulate(scale, shift, eps)
