"""Factors that balance both sides, against their conditions and against what they minimise."""

import pytest
import torch

from comfyui_nibble.quant_core.methods.balance import metric, riccati, sqrtm

pytestmark = pytest.mark.quick


def spd(n, seed):
    a = torch.randn(n, 3 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = a * torch.logspace(-0.5, 0.5, n, dtype=torch.float64)[:, None]
    return a @ a.T


def traces(s, g, m):
    return float((s @ m).trace() * (g @ torch.linalg.inv(m)).trace())


def test_riccati_and_roots():
    s, g = spd(12, 0), spd(12, 1)
    m = riccati(s, g)
    torch.testing.assert_close(m @ s @ m, g, rtol=1e-8, atol=1e-8 * float(g.abs().max()))
    torch.testing.assert_close(sqrtm(s) @ sqrtm(s), s)
    torch.testing.assert_close(sqrtm(torch.stack([s, g]))[1], sqrtm(g))


def test_moments_that_are_kronecker_products_are_balanced_exactly():
    """Both sides then have the same covariance, P^T S P = P^-1 G P^-T up to a constant, which is the least
    the traces can have."""
    sizes = (4, 6)
    s, g = torch.kron(spd(4, 2), spd(6, 3)), torch.kron(spd(4, 4), spd(6, 5))
    m = torch.kron(*metric(s, g, sizes, 0.0))
    torch.testing.assert_close(torch.linalg.det(m), torch.tensor(1.0, dtype=torch.float64))
    both = m @ s @ m
    torch.testing.assert_close(both / both.trace(), g / g.trace(), rtol=1e-6, atol=1e-9)
    least = float(sqrtm(sqrtm(s) @ g @ sqrtm(s)).trace()) ** 2
    assert abs(traces(s, g, m) / least - 1) < 1e-8


def test_no_neighbour_is_better():
    """On moments that are no Kronecker products, which the damping is part of."""
    s, g, damp = spd(24, 6), spd(24, 7).flip(0, 1), 0.03
    one, two = metric(s, g, (4, 6), damp)
    s, g = (h + damp * h.diagonal().mean() * torch.eye(24, dtype=torch.float64) for h in (s, g))
    best = traces(s, g, torch.kron(one, two))
    assert best < 0.5 * traces(s, g, torch.eye(24, dtype=torch.float64))
    contract = lambda h, m: torch.einsum("abcd,bd->ac", h.view(4, 6, 4, 6), m)
    balanced, wanted = one @ contract(s, two) @ one, contract(g, torch.linalg.inv(two))
    torch.testing.assert_close(balanced / balanced.trace(), wanted / wanted.trace(), rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(8)
    for _ in range(50):
        moved = []
        for m in (one, two):
            step = 1e-2 * torch.randn(m.shape, generator=generator, dtype=torch.float64)
            root = sqrtm(m) @ torch.linalg.matrix_exp(step + step.mT)
            moved.append(root @ root.mT)
        assert traces(s, g, torch.kron(*moved)) > best * (1 - 1e-6)
