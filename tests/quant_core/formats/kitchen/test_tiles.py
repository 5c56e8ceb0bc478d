"""Tiles of scales are comfy-kitchen's, and come back."""

import pytest
import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked

from comfyui_nibble.quant_core.formats.kitchen.tiles import natural, tiled, tiled_shape

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("shape", [(128, 4), (256, 64), (40, 7), (130, 5)])
def test_tiles_are_comfy_kitchens(shape):
    raw = torch.randint(0, 127, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales = raw.view(torch.float8_e4m3fn)
    found = tiled(scales)
    assert (found.dtype, found.shape) == (scales.dtype, tiled_shape(*shape))
    assert torch.equal(found.view(torch.uint8), to_blocked(raw, flatten=False))
    assert torch.equal(natural(found.view(torch.uint8), *shape), raw)
    assert torch.equal(
        natural(found.view(torch.uint8), *shape), from_blocked(found.view(torch.uint8), *shape)
    )
