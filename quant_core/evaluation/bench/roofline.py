"""The least time of the activation quantizer with and without a learned transform: arithmetic on data sheets,
no measurement.

A time is the larger of the bytes over the bandwidth and the products over the tensor cores' rate.
Instructions in between, latency, shared memory and launches are not in it.
"""

from dataclasses import dataclass

from ....kernels.target import Target
from ....kernels.tuning import kronecker_tile


@dataclass(frozen=True)
class Card:
    """bytes_per_s of its memory; flops: dense fp16 products with fp32 sums, FLOP/s. From the makers' data
    sheets."""

    name: str
    bytes_per_s: float
    flops: float


RTX_3090 = Card("RTX 3090", 936e9, 71e12)
RTX_4090 = Card("RTX 4090", 1008e9, 165.2e12)
A100 = Card("A100 SXM 80 GB", 2039e9, 312e12)
H100 = Card("H100 SXM", 3350e9, 989.4e12)
CARDS = (RTX_3090, RTX_4090, A100, H100)


def quantizer_bytes(m: int, k: int, code_bits: int = 4) -> float:
    """16-bit x (m, k) in, codes out and a scale a token, in fp32."""
    return m * (2 * k + k * code_bits / 8 + 4)


def transform_flops(m: int, p1: int, p2: int, slices: int, padded: bool = True) -> int:
    """Of P1^T X P2 for each slice X (p1, p2) of m tokens, as the kernel pads them or as the formula has
    them."""
    if padded:
        tile = kronecker_tile(Target("cuda", 89), p1, p2, slices, False)
        (p1, p2), slices = tile.sides, tile.slices
    return 2 * m * slices * p1 * p2 * (p1 + p2)


def quantizer_seconds(card: Card, m: int, k: int, code_bits: int = 4) -> float:
    """Without a transform: bound by memory."""
    return quantizer_bytes(m, k, code_bits) / card.bytes_per_s


def transform_seconds(
    card: Card, m: int, p1: int, p2: int, slices: int, code_bits: int = 4, rate: float = 1.0, times: int = 1
) -> float:
    """With the transform. rate: of the products relative to fp16, 0.5 for tf32. times: that each product is
    computed."""
    products = times * transform_flops(m, p1, p2, slices) / (rate * card.flops)
    return max(quantizer_seconds(card, m, p1 * p2 * slices, code_bits), products)


def ratio(card: Card, m: int, p1: int, p2: int, slices: int, **how) -> float:
    """Time with the transform over time without; `how` as in `transform_seconds`."""
    return transform_seconds(card, m, p1, p2, slices, **how) / quantizer_seconds(
        card, m, p1 * p2 * slices, how.get("code_bits", 4)
    )
