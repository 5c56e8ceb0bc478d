import pytest
import torch
from comfy_kitchen.backends.eager import svdquant as kitchen
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_nibble.kernels.operator.packing import pack, pack_base3, unpack, unpack_base3

pytestmark = pytest.mark.quick


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
    codes = torch.randint(
        -8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    packed = pack(codes, 4)
    assert torch.equal(packed, kitchen._pack_int4_row_major(codes))
    assert torch.equal(unpack(packed, 4), kitchen._unpack_int4_row_major(packed))
    assert torch.equal(
        unpack(packed, 4, unsigned=True).to(torch.int8), kitchen._unpack_uint4_row_major(packed)
    )


def test_width_that_does_not_fill_bytes_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 2, found 3"):
        pack(torch.zeros(1, 3), 4)


def test_unknown_width_is_refused():
    with pytest.raises(ValueError, match="2, 4 or 8 bits, not 3"):
        pack(torch.zeros(1, 8), 3)


def test_five_trits_are_a_byte_first_code_lowest():
    packed = pack_base3(torch.tensor([[1, -1, -1, -1, -1, 1, 1, 1, 1, 1, -1]]))
    assert packed.tolist() == [
        [2, 242, 0 + 3 + 9 + 27 + 81]
    ]  # the last row end is filled with zeros, digit 1
    assert packed.dtype == torch.uint8


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_trits_survive(rows, width, seed):
    codes = torch.randint(
        -1, 2, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    packed = pack_base3(codes)
    assert packed.shape == (rows, -(-width // 5))
    assert packed.max() <= 242
    assert torch.equal(unpack_base3(packed, width), codes)


def test_what_is_no_trit_is_refused():
    with pytest.raises(ValueError, match="needs codes -1, 0 and 1, found -2 to 1"):
        pack_base3(torch.tensor([[1, -2]]))
    with pytest.raises(ValueError, match="a byte of at most 242, found 243"):
        unpack_base3(torch.tensor([[243]], dtype=torch.uint8), 5)
