"""Thin bases and truncated fits against torch's own decompositions."""

import pytest
import torch

from comfyui_nibble.quant_core.layer.lowrank import conditioned, orthonormal, truncated, truncated_chunks


@pytest.mark.parametrize("make", [orthonormal, conditioned])
@pytest.mark.parametrize("size", [1.0, 1e17, 1e-17])
def test_a_basis_of_the_columns(make, size):
    y = torch.randn(300, 48, generator=torch.Generator().manual_seed(0))
    q = make(y * size)
    assert (q.T @ q - torch.eye(48)).abs().max() < 2e-5
    assert (q @ (q.T @ y) - y).abs().max() < 1e-4  # it spans them


def test_columns_that_are_nearly_dependent():
    """A condition of 1e5, where the Gram matrix in fp32 would not be one; one column above all; zeros."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(300, 8, generator=g)
    y[:, 7] = y[:, :7].sum(1) + 1e-5 * y[:, 7]
    q = orthonormal(y)
    assert (q.T @ q - torch.eye(8)).abs().max() < 1e-4
    y[3, 5] = 1e17
    for make in (orthonormal, conditioned):
        assert make(y).isfinite().all()
        assert make(torch.zeros(16, 4)).abs().max() == 0


def test_is_the_best_fit_of_its_rank():
    g = torch.Generator().manual_seed(1)
    spectrum = torch.logspace(0, -3, 64)
    a = torch.linalg.qr(torch.randn(200, 64, generator=g))[0] * spectrum
    a = a @ torch.linalg.qr(torch.randn(96, 64, generator=g))[0].T
    v, u = truncated(lambda rows: a[rows], a.shape, 8)
    best = spectrum[8:].square().sum().sqrt()
    assert (a - u @ v.T).norm() < 1.001 * best
    assert (u.norm(dim=0) - v.norm(dim=0)).abs().max() < 1e-5  # the singular values stand evenly on both


def test_a_thin_product_is_taken_out_first():
    """As if it had been subtracted, plain and in a metric."""
    g = torch.Generator().manual_seed(3)
    a, v, u = (torch.randn(*shape, generator=g) for shape in ((80, 64), (64, 5), (80, 5)))
    rest = a - u @ v.T
    upper = torch.randn(64, 64, generator=g).triu() + 8 * torch.eye(64)
    for factor in (None, {(0, 64): upper}):
        want_v, want_u = truncated(lambda rows: rest[rows], a.shape, 6, factor)
        got_v, got_u = truncated(lambda rows: a[rows], a.shape, 6, factor, less=(v, u))
        assert (want_u @ want_v.T - got_u @ got_v.T).norm() < 1e-4 * rest.norm()


def test_a_batch_is_fitted_one_by_one():
    a = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(2))
    v, u = truncated_chunks([(slice(0, 50), a)], 6)
    for i in range(3):
        one_v, one_u = truncated(lambda rows, i=i: a[i][rows], (50, 40), 6)
        assert (u[i] @ v[i].T - one_u @ one_v.T).abs().max() < 1e-4
