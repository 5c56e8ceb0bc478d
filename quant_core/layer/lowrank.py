"""Truncated SVD of a weight that is made in row chunks."""

import torch

from .chunks import row_chunks


def truncated(
    rows_of,
    shape,
    rank: int,
    factor=None,
    oversample: int = 16,
    iterations: int = 3,
    seed: int = 0,
    device: torch.device | None = None,
    less=None,
):
    """The best rank-`rank` fit of A, or of A in the metric of H = C C^T (whitened Eckart-Young, as in H-SVD).

    rows_of(slice) -> rows of A (n, w) fp32 on `device`. factor: block-diagonal upper triangular C as {(start,
    stop): (k, k)}, or None. less: (v (w, p), u (n, p)) fp32 where the matrix is A - u v^T. Returns (v (w,
    rank), u (n, rank)) fp32 with A ~ u v^T, the singular values shared evenly between the two. Randomised
    subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4): two thin products an iteration.
    """
    n, w = shape
    # Each chunk is made once, smoothed and rotated, and read eight times: 4 bytes a weight while this runs.
    chunks = [(rows, rows_of(rows)) for rows in row_chunks(n, w, device=device)]
    return truncated_chunks(
        chunks,
        rank,
        factor,
        oversample,
        iterations,
        seed,
        less,
    )


def truncated_chunks(
    chunks, rank: int, factor=None, oversample: int = 16, iterations: int = 3, seed: int = 0, less=None
):
    """`truncated` of matrices in chunks of rows, [(rows, (..., n of the rows, w) fp32)]: one, or a batch of
    them in leading dimensions, of which each gets a fit of its own, (..., w, rank) and (..., n, rank)."""
    first = chunks[0][1]
    n, w = chunks[-1][0].stop, first.shape[-1]
    width = min(rank + oversample, n, w)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(w, width, generator=generator).to(first.device)
    for _ in range(iterations):
        basis = conditioned(_times(chunks, _apply(factor, probe), less))
        probe = conditioned(_apply_t(factor, _times_t(chunks, basis, less)))
    basis = orthonormal(_times(chunks, _apply(factor, probe), less))
    small = _apply_t(factor, _times_t(chunks, basis, less)).mT.double()  # (width, w) = basis^T A C
    # Its SVD by the one of its Gram matrix, width x width.
    squares, u = torch.linalg.eigh(small @ small.mT)
    squares, u = squares.flip(-1)[..., :rank].clamp(min=0), u.flip(-1)[..., :rank]
    root = squares.sqrt().sqrt()
    v = (small.mT @ u / root.clamp(min=1e-30).unsqueeze(-2)).float()
    v, u = _unapply(factor, v), basis @ (u * root.unsqueeze(-2)).float()
    sizes = v.norm(dim=-2, keepdim=True), u.norm(dim=-2, keepdim=True)
    balance = (sizes[0] / sizes[1].clamp(min=1e-20)).clamp(min=1e-20).sqrt()
    return v / balance, u * balance


def strongest(
    h: torch.Tensor, count: int, iterations: int = 4, smooth: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values (count,), vectors (k, count) fp32): the largest eigenvalues of second moments h (k, k) fp32, of
    diag(1/s) h diag(1/s) with `smooth` (k,), and orthonormal vectors of them, by subspace iteration."""
    by = 1 if smooth is None else 1 / smooth[:, None]
    times = lambda x: by * (h @ (by * x))
    width = min(count + 16, h.shape[0])
    basis = torch.randn(h.shape[0], width, generator=torch.Generator().manual_seed(0)).to(h.device)
    for _ in range(iterations):
        basis = conditioned(times(basis))
    basis = orthonormal(times(basis))
    values, vectors = torch.linalg.eigh((basis.T @ times(basis)).double())
    return values.flip(0)[:count].float(), basis @ vectors.flip(1)[:, :count].float()


def projected(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """P H P (k, k), P = 1 - V V^T: second moments of what is left of x without components V (k, count)."""
    hv = h @ v
    half = torch.addmm(hv, v, v.T @ hv, alpha=-0.5)
    # One product of twice the columns: 59 ms for k = 3072, where its four terms one by one take 274.
    return torch.addmm(h, torch.cat([half, v], 1), torch.cat([v, half], 1).T, alpha=-1)


def orthonormal(y: torch.Tensor) -> torch.Tensor:
    """A basis (..., n, r) fp32 of the columns of y (..., n, r): a shifted Cholesky QR, and another one of
    what comes out (Fukaya et al., SIAM J. Sci. Comput. 2020), since a QR of so thin a matrix is a launch a
    column on a card. Columns that depend on others to 1e-6 come out as zero or short."""
    for _ in range(2):
        y = y.double() @ _inverse_root(y)
    return y.float()


def conditioned(y: torch.Tensor) -> torch.Tensor:
    """The span of y (..., n, r) by columns (..., n, r) fp32 of which none drowns, for the next step of an
    iteration: one round of `orthonormal`, its last product in fp32."""
    size = y.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
    y = y / size
    return y @ _inverse_root(y).float()


def _inverse_root(y):
    """R^-1 (..., r, r) fp64 with y^T y = R^T R, shifted by 1e-13 of its trace."""
    y = y.double()
    gram = y.mT @ y
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-13 * diagonal.sum(-1, keepdim=True) + 1e-60
    lower = torch.linalg.cholesky_ex(gram).L
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=y.device)
    return torch.linalg.solve_triangular(lower, unit, upper=False).mT


def _times(chunks, x, less=None):
    """A x, or (A - u v^T) x with `less` (v, u)."""
    y = torch.cat([chunk @ x for _, chunk in chunks], -2) if len(chunks) > 1 else chunks[0][1] @ x
    return y if less is None else torch.addmm(y, less[1], less[0].T @ x, alpha=-1)


def _times_t(chunks, y, less=None):
    """A^T y, or (A - u v^T)^T y."""
    x = sum(chunk.mT @ y[..., rows, :] for rows, chunk in chunks)
    return x if less is None else torch.addmm(x, less[0], less[1].T @ y, alpha=-1)


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
