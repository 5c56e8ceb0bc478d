"""Integer codes in bytes. Low bits first: with 4 bits, the even channel is the low nibble (as comfy-kitchen
stores it)."""

import torch

PACKABLE_BITS = (2, 4, 8)
TRITS = 5  # a byte: 3^5 = 243


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., K), any integer dtype -> int8 (..., K * bits / 8). Only the low `bits` of each code are
    kept.

    Raises ValueError where `bits` is not 2, 4 or 8, or K does not fill whole bytes.
    """
    per_byte = _per_byte(bits)
    if codes.shape[-1] % per_byte:
        raise ValueError(
            f"packing at {bits} bits needs the last dimension to be a multiple of {per_byte}, found "
            f"{codes.shape[-1]}"
        )
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


def pack_base3(codes: torch.Tensor) -> torch.Tensor:
    """Codes -1, 0 and 1 (..., K), any integer dtype -> uint8 (..., ceil(K / 5)): 1.6 bits a code, on disk
    only.

    A byte is the sum of (code + 1) 3^i over its five codes, the first at i = 0; rows are filled up with
    zeros. Raises ValueError for other codes.
    """
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(
            f"packing in base 3 needs codes -1, 0 and 1, found {int(codes.min())} to {int(codes.max())}"
        )
    digits = torch.nn.functional.pad(codes + 1, (0, -codes.shape[-1] % TRITS), value=1).to(torch.uint8)
    packed = digits[..., 0::TRITS].clone()
    for i in range(1, TRITS):
        packed += digits[..., i::TRITS] * 3**i
    return packed


def unpack_base3(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_base3`: uint8 (..., ceil(count / 5)) -> int8 (..., count). Raises ValueError for
    bytes that it does not write."""
    if packed.numel() and packed.max() >= 3**TRITS:
        raise ValueError(f"five trits are a byte of at most {3**TRITS - 1}, found {int(packed.max())}")
    digits = torch.stack([packed // 3**i % 3 for i in range(TRITS)], -1).flatten(-2)
    return digits[..., :count].to(torch.int8) - 1


def _per_byte(bits: int) -> int:
    if bits not in PACKABLE_BITS:
        raise ValueError(
            f"codes are stored at 2, 4 or 8 bits, not {bits} (3-bit codes and trits take a wider field)"
        )
    return 8 // bits
