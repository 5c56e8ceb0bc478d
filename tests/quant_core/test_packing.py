import pytest
import torch
from comfy_kitchen.backends.eager import svdquant as kitchen
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_nibble.quant_core.packing import pack, unpack


def test_even_channel_is_the_low_nibble():
    assert pack(torch.tensor([[1, 2, -8, 7]]), 4).view(torch.uint8).tolist() == [[0x21, 0x78]]


def test_two_bits_pack_four_a_byte_low_bits_first():
    assert pack(torch.tensor([[0, 1, -2, -1]]), 2).view(torch.uint8).tolist() == [[0b11_10_01_00]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("unsigned", [False, True])
def test_every_code_survives(bits, unsigned):
    low, count = (0 if unsigned else -(2 ** (bits - 1))), 2**bits
    codes = (torch.arange(4 * count) % count + low).reshape(2, -1)
    assert torch.equal(unpack(pack(codes, bits), bits, unsigned).int(), codes.int())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_nibbles_equal_comfy_kitchen(rows, pairs, seed):
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(codes, 4)
    assert torch.equal(packed, kitchen._pack_int4_row_major(codes))
    assert torch.equal(unpack(packed, 4), kitchen._unpack_int4_row_major(packed))
    assert torch.equal(unpack(packed, 4, unsigned=True).to(torch.int8), kitchen._unpack_uint4_row_major(packed))


def test_width_that_does_not_fill_bytes_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 2, found 3"):
        pack(torch.zeros(1, 3), 4)


def test_unknown_width_is_refused():
    with pytest.raises(ValueError, match="2, 4 or 8 bits, not 3"):
        pack(torch.zeros(1, 8), 3)
