import pytest
import torch
from comfy_kitchen.backends.eager import convrot_w4a4 as kitchen

from comfyui_nibble.kernels.operator.transforms import (
    fold_weight,
    hadamard,
    rotate,
    rotation_size,
    transform_activation,
    unfold_weight,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64, 128, 256])
def test_hadamard_is_orthonormal_and_symmetric(size):
    h = hadamard(size, dtype=torch.float64)
    assert torch.allclose(h @ h.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(h, h.T)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_hadamard_equals_comfy_kitchen(size):
    assert torch.equal(hadamard(size), kitchen._build_hadamard(size))


@pytest.mark.parametrize("rotation", [0, 64, 128])
@pytest.mark.parametrize("smoothed", [False, True])
def test_fold_and_transform_cancel_in_float64(rotation, smoothed):
    g = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(5, 384, generator=g, dtype=torch.float64),
        torch.randn(7, 384, generator=g, dtype=torch.float64),
    )
    smooth = torch.rand(384, generator=g, dtype=torch.float64) + 0.1 if smoothed else None
    y = transform_activation(x, smooth, rotation) @ fold_weight(w, smooth, rotation).T
    assert torch.allclose(y, x @ w.T, rtol=0, atol=1e-12)
    assert torch.allclose(
        unfold_weight(fold_weight(w, smooth, rotation), smooth, rotation), w, rtol=0, atol=1e-12
    )


def test_rotation_spreads_one_channel():
    x = torch.zeros(1, 256)
    x[0, 3] = 16.0
    assert torch.allclose(rotate(x, 256).abs(), torch.ones(1, 256))


def test_rotation_size_is_the_largest_power_of_two():
    assert [rotation_size(k, 256) for k in (3072, 1152, 12288, 4608, 192)] == [256, 128, 256, 256, 64]
    assert rotation_size(3072, 0) == 0


def test_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="do not divide K = 96"):
        rotate(torch.zeros(1, 96), 64)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(48)
