"""Sizes and orthogonal starts of Kronecker factors."""

import torch

from ...kernels.operator.transforms import hadamard


class NoBalancedFactors(ValueError):
    """A width that cannot be cut as asked."""


def balanced(width: int) -> tuple[int, int]:
    """p1 <= p2 with p1 p2 = width, as close to each other as there are. Raises NoBalancedFactors for a prime
    above 3."""
    p1 = max(i for i in range(1, int(width**0.5) + 1) if width % i == 0)
    if p1 == 1 and width > 3:
        raise NoBalancedFactors(
            f"{width} channels a slice have no factors but 1; the nearest that do are {width - 1} and "
            f"{width + 1}"
        )
    return p1, width // p1


def slice_width(width: int, slices: int) -> int:
    """Channels of a slice. Raises NoBalancedFactors where `slices` does not divide the width, naming the
    nearest that do."""
    if width % slices:
        near = sorted((s for s in range(1, width // 2) if width % s == 0), key=lambda s: abs(s - slices))[:2]
        raise NoBalancedFactors(
            f"{slices} slices do not divide {width} channels; the nearest that do: "
            f"{' and '.join(map(str, near))}"
        )
    return width // slices


def start_factor(size: int, seed: int) -> torch.Tensor:
    """An orthogonal (size, size) that spreads each channel over all: Hadamard where size is a power of two,
    else a random one."""
    if size > 1 and size & (size - 1) == 0:
        return hadamard(size)
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def hadamard_factor(size: int) -> torch.Tensor:
    """The Hadamard matrix of the largest power of two that divides size, (x) the orthonormal DCT-II of what
    is left, (size, size)."""
    two = size & -size
    rest = size // two
    k = torch.arange(rest, dtype=torch.float64)
    dct = torch.cos(torch.pi / rest * (k[None] + 0.5) * k[:, None]) * (2 / rest) ** 0.5
    dct[0] /= 2**0.5
    return torch.kron(hadamard(two) if two > 1 else torch.ones(1, 1), dct.float())
