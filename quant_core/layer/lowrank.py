"""Truncated SVD of a weight that is made in row chunks."""

import torch

from .chunks import row_chunks


def truncated(
    rows_of, shape, rank: int, factor=None, oversample: int = 16, iterations: int = 3, seed: int = 0
):
    """The best rank-`rank` fit of A, or of A in the metric of H = C C^T (whitened Eckart-Young, as in H-SVD).

    rows_of(slice) -> rows of A (n, w) fp32. factor: block-diagonal upper triangular C as {(start, stop): (k,
    k)}, or None. Returns (v (w, rank), u (n, rank)) fp32 with A ~ u v^T, the singular values shared evenly
    between the two. Randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4): two thin
    products an iteration.
    """
    n, w = shape
    # Each chunk is made once, smoothed and rotated, and read eight times: 4 bytes a weight while this runs.
    chunks = [(rows, rows_of(rows)) for rows in row_chunks(n, w)]
    width = min(rank + oversample, n, w)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(w, width, generator=generator).to(chunks[0][1].device)
    for _ in range(iterations):
        basis = torch.linalg.qr(_times(chunks, _apply(factor, probe)))[0]
        probe = torch.linalg.qr(_apply_t(factor, _times_t(chunks, basis)))[0]
    basis = torch.linalg.qr(_times(chunks, _apply(factor, probe)))[0]
    small = _apply_t(factor, _times_t(chunks, basis)).T  # (width, w) = basis^T A C
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    root = s[:rank].sqrt()
    v = _unapply(factor, vh[:rank].T * root)
    u = basis @ u[:, :rank] * root
    balance = (v.norm(dim=0) / u.norm(dim=0).clamp(min=1e-20)).clamp(min=1e-20).sqrt()
    return v / balance, u * balance


def _times(chunks, x):
    """A x."""
    return torch.cat([chunk @ x for _, chunk in chunks])


def _times_t(chunks, y):
    """A^T y."""
    return sum(chunk.T @ y[rows] for rows, chunk in chunks)


def _apply(factor, x):
    """C x."""
    return x if factor is None else torch.cat([c @ x[a:b] for (a, b), c in sorted(factor.items())])


def _apply_t(factor, x):
    """C^T x."""
    return x if factor is None else torch.cat([c.T @ x[a:b] for (a, b), c in sorted(factor.items())])


def _unapply(factor, x):
    """C^-T x."""
    if factor is None:
        return x
    return torch.cat(
        [torch.linalg.solve_triangular(c.T, x[a:b], upper=False) for (a, b), c in sorted(factor.items())]
    )
