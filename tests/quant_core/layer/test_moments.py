"""X^T X is exact in its products, fp32 in its sums and whole once it is mirrored."""

import pytest
import torch

from comfyui_nibble.quant_core.layer.moments import TILE, add_upper, mirror
from comfyui_nibble.quant_core.layer.statistics import InputStatistics, peaks_of

WIDTHS = [64, TILE, TILE + 64, 2 * TILE + 448]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_equal_to_the_product_in_fp64(width, dtype):
    x = torch.randn(700, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = torch.zeros(width, width)
    for piece in x.split(300):
        add_upper(found, piece)
    mirror(found)
    want = x.double().T @ x.double()
    # Sums of 700 fp32 values; a result rounded to bf16 would be off by 4e-3 on the diagonal.
    assert ((found - want).abs().max() / want.abs().max()) < 2e-6
    assert torch.equal(found, found.T)


def test_below_the_diagonal_nothing_is_computed():
    """Of three tiles six of nine are: what stands in the others is as it was."""
    found = torch.full((3 * TILE, 3 * TILE), 7.0)
    add_upper(found, torch.ones(2, 3 * TILE))
    below = torch.arange(3 * TILE) // TILE
    assert (found[below[:, None] > below[None]] == 7).all()
    assert (found[below[:, None] <= below[None]] == 9).all()


def test_the_precision_of_products_is_put_back():
    """In fp32 everything else stays in fp32, also where adding fails."""
    matmul = torch.backends.mkldnn.matmul
    was = matmul.fp32_precision
    add_upper(torch.zeros(64, 64), torch.ones(4, 64, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError):
        add_upper(torch.zeros(64, 64), torch.ones(4, 32, dtype=torch.bfloat16))
    assert matmul.fp32_precision == was
    x = torch.full((64, 64), 1 + 2.0**-12)
    assert torch.equal(x @ torch.eye(64), x)


def test_added_and_mirrored_is_updated():
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    blocks = ((0, 64), (64, 256))
    a, b = (InputStatistics.empty("layer", 256, blocks) for _ in range(2))
    for piece in x.split(20):
        a.update(piece)
        b.add(piece, peaks_of(piece))
    b.mirror()
    assert all(torch.equal(a.hessians[k], b.hessians[k]) for k in blocks)
