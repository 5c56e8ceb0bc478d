"""Integer codes in bytes. Low bits first: with 4 bits, the even channel is the low nibble (as comfy-kitchen stores it)."""

import torch

PACKABLE_BITS = (2, 4, 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., K), any integer dtype -> int8 (..., K * bits / 8). Only the low `bits` of each code are kept.

    Raises ValueError where `bits` is not 2, 4 or 8, or K does not fill whole bytes.
    """
    per_byte = _per_byte(bits)
    if codes.shape[-1] % per_byte:
        raise ValueError(f"packing at {bits} bits needs the last dimension to be a multiple of {per_byte}, found {codes.shape[-1]}")
    if bits == 8:
        return codes.to(torch.int8)
    fields = codes.to(torch.uint8) & (2**bits - 1)
    packed = fields[..., 0::per_byte]
    for i in range(1, per_byte):
        packed = packed | fields[..., i::per_byte] << (bits * i)
    return packed.view(torch.int8)


def unpack(packed: torch.Tensor, bits: int, unsigned: bool = False) -> torch.Tensor:
    """The inverse of `pack`: int8 (..., B) -> codes (..., B * 8 / bits), int8 (uint8 if `unsigned`)."""
    per_byte = _per_byte(bits)
    raw = packed.contiguous().view(torch.uint8)
    if bits < 8:
        # To the top of the byte and back: the arithmetic shift of int8 extends the sign.
        fields = torch.stack([raw << (8 - bits * (i + 1)) for i in range(per_byte)], -1).flatten(-2)
        return fields >> (8 - bits) if unsigned else fields.view(torch.int8) >> (8 - bits)
    return raw if unsigned else raw.view(torch.int8)


def _per_byte(bits: int) -> int:
    if bits not in PACKABLE_BITS:
        raise ValueError(f"codes are stored at 2, 4 or 8 bits, not {bits} (3-bit codes and trits take a wider field)")
    return 8 // bits
