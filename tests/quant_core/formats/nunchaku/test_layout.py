"""The index maps against loops over single elements, each put where `tests/assets/nunchaku.py` says that a
kernel looks for it."""

import pytest
import torch

from comfyui_nibble.kernels.operator.packing import pack
from comfyui_nibble.quant_core.formats.nunchaku import layout
from comfyui_nibble.quant_core.layer.linear import same_bits
from comfyui_nibble.tests.assets.nunchaku import (
    awq_place,
    fragment_place,
    micro_place,
    scale_place,
    weight_place,
)

pytestmark = pytest.mark.quick


def codes(n, k, low, high, seed=0):
    return torch.randint(low, high, (n, k), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384)])
def test_weight(n, k):
    natural = codes(n, k, -8, 8)
    stored = bytearray(n * k // 2)
    for row, values in enumerate(natural.tolist()):
        for column, code in enumerate(values):
            byte, shift = weight_place(row, column, k)
            stored[byte] |= (code & 15) << shift
    stored = torch.frombuffer(stored, dtype=torch.int8).view(n, k // 2)
    packed = pack(natural, 4)
    assert torch.equal(layout.unpack_weight(stored), packed)
    assert torch.equal(layout.pack_weight(packed), stored)


@pytest.mark.parametrize(("groups", "n"), [(1, 128), (2, 256), (5, 384)])
def test_scale(groups, n):
    natural = torch.randn(groups, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = torch.empty(groups * n, dtype=torch.bfloat16)
    for g in range(groups):
        for channel in range(n):
            stored[scale_place(g, channel, groups)] = natural[g, channel]
    stored = stored.view(groups, n)
    assert torch.equal(layout.unpack_scale(stored), natural)
    assert torch.equal(layout.pack_scale(natural), stored)
    if groups == 1:
        assert torch.equal(layout.unpack_vector(stored[0]), natural[0])
        assert torch.equal(layout.pack_vector(natural[0]), stored[0])


@pytest.mark.parametrize(("n", "groups"), [(128, 8), (384, 24)])
def test_micro_scale(n, groups):
    natural = codes(n, groups, 0, 127).to(torch.uint8)
    stored = torch.empty(n * groups, dtype=torch.uint8)
    for row, values in enumerate(natural.tolist()):
        for group, byte in enumerate(values):
            stored[micro_place(row, group, groups)] = byte
    natural, stored = (t.view(torch.float8_e4m3fn) for t in (natural, stored.view(groups, n)))
    assert same_bits(layout.unpack_micro_scale(stored), natural)
    assert same_bits(layout.pack_micro_scale(natural), stored)


def test_the_first_rows_of_a_micro_scale():
    """Which out-channels the first lanes load, as deepcompressor's comment on `pack_micro_scale` lists
    them."""
    rows = torch.arange(128, dtype=torch.uint8).clamp(max=126)[:, None].expand(128, 4).contiguous()
    stored = layout.pack_micro_scale(rows.view(torch.float8_e4m3fn)).flatten().view(torch.uint8)
    lanes = stored.view(32, 4, 4)[:, :, 0].tolist()
    assert lanes[:5] == [
        [0, 32, 64, 96],
        [8, 40, 72, 104],
        [16, 48, 80, 112],
        [24, 56, 88, 120],
        [1, 33, 65, 97],
    ]
    assert lanes[28] == [7, 39, 71, 103]


@pytest.mark.parametrize(("channels", "rank"), [(128, 16), (256, 48)])
def test_low_rank(channels, rank):
    natural = torch.arange(channels * rank, dtype=torch.float32).view(channels, rank).half()
    down, up = (
        torch.empty(channels * rank, dtype=torch.float16),
        torch.empty(channels * rank, dtype=torch.float16),
    )
    for c in range(channels):
        for r in range(rank):
            block = c // 16 * (rank // 16) + r // 16
            down[fragment_place(r, c, block)] = natural[
                c, r
            ]  # ranks are the rows of the first product's fragment
            up[fragment_place(c, r, block)] = natural[c, r]
    for stored, unpack, pack_back in (
        (down, layout.unpack_down, layout.pack_down),
        (up, layout.unpack_up, layout.pack_up),
    ):
        stored = stored.view(channels, rank)
        assert torch.equal(unpack(stored), natural)
        assert torch.equal(pack_back(natural), stored)


@pytest.mark.parametrize(("n", "k"), [(4, 64), (24, 192)])
def test_awq(n, k):
    natural = codes(n, k, 0, 16)
    words = [0] * (n * k // 8)
    for row, values in enumerate(natural.tolist()):
        for column, code in enumerate(values):
            word, shift = awq_place(row, column, k)
            words[word] |= code << shift
    stored = torch.tensor(words).to(torch.int32).view(n // 4, k // 2)  # wraps where the top bit is set
    assert torch.equal(layout.unpack_awq(stored), pack(natural, 4))
    assert torch.equal(layout.pack_awq(pack(natural, 4)), stored)


def test_interleaved_rows():
    """Output c * splits + i is channel c of part i: nunchaku views its output as (dim, splits)."""
    model = torch.arange(24).view(12, 2)  # 3 parts of 4 channels
    stored = torch.stack([model[i * 4 + c] for c in range(4) for i in range(3)])
    assert torch.equal(layout.interleave(model, 3), stored)
    assert torch.equal(layout.deinterleave(stored, 3), model)
    assert [list(range(s))[layout.SCALES] for s in (3, 6)] == [[1], [1, 4]]
