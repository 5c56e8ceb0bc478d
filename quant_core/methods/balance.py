"""Affine Kronecker factors that balance both sides of a product, in closed form: no training.

Of z = P^T x and W P^-T, rounding z adds noise that goes as the energy of z, its scale, times that of the
folded weight, and so does rounding the weight: tr(P^T S P) tr(P^-1 G P^-T), with S the second moments of x
and G = W^T W. For P = P1 (x) P2 and P2 as it is, that product is least where M1 = P1 P1^T is the geometric
mean of S1^-1 and G1, both contracted with P2: M1 S1 M1 = G1 (a Riccati equation; Bhatia, Positive Definite
Matrices, section 4.1). The same holds for P2, so the two take turns.
"""

import torch

ROUNDS = 12  # the factors move by less than 1e-3 after 6 on layers with outliers


def sqrtm(matrix: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    """matrix^power of a symmetric positive definite (..., n, n)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=values[..., -1:] * 1e-14).pow(power)[..., None, :]) @ vectors.mT


def riccati(s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The positive definite M with M s M = g."""
    root, back = sqrtm(s), sqrtm(s, -0.5)
    mean = back @ sqrtm(root @ g @ root) @ back
    return (mean + mean.mT) / 2


def metric(
    s: torch.Tensor, g: torch.Tensor, sizes: tuple[int, int], damp: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M1 (p1, p1), M2 (p2, p2)), fp64, each of determinant 1, for s and g (p1 p2, p1 p2); damp: in units of
    their mean diagonal."""
    p1, p2 = sizes
    s, g = (_by_factor(h.double(), p1, p2, damp) for h in (s, g))
    two = torch.eye(p2, dtype=torch.float64, device=s.device)
    for _ in range(ROUNDS):
        one = _unit(
            riccati((s @ two.flatten()).view(p1, p1), (g @ torch.linalg.inv(two).flatten()).view(p1, p1))
        )
        two = _unit(
            riccati((one.flatten() @ s).view(p2, p2), (torch.linalg.inv(one).flatten() @ g).view(p2, p2))
        )
    return one, two


def _by_factor(matrix, p1, p2, damp):
    """(p1 p2, p1 p2) with damping as (p1 p1, p2 p2): a contraction with one factor is then a product with a
    vector."""
    matrix = matrix + damp * matrix.diagonal().mean().clamp(min=1e-30) * torch.eye(
        p1 * p2, dtype=matrix.dtype, device=matrix.device
    )
    return matrix.view(p1, p2, p1, p2).transpose(1, 2).reshape(p1 * p1, p2 * p2)


def _unit(matrix):
    return matrix / (torch.linalg.slogdet(matrix)[1] / len(matrix)).exp()
