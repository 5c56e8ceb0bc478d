"""Public throughputs of the cards that are modelled, with their sources.

Tensor cores, clocks, memory: NVIDIA's white papers, dense figures at boost clock: "Turing GPU Architecture"
(2080 Ti), "Ampere GA102 GPU Architecture" (3090), "A100 Tensor Core GPU Architecture", "Ada GPU
Architecture" (4090), "H100 Tensor Core GPU Architecture", "RTX Blackwell GPU Architecture" (5090), and the
data sheet of the DGX B200. Lanes of a sub-core for FP32, integers and special functions: "Throughput of
native arithmetic instructions" in the CUDA C++ Programming Guide.

Assumed, because nobody publishes it: the bandwidth of the L2 (but for A100: 5120 bytes a clock, of which 70 %
are taken), the share of the peak that cuBLAS reaches in 16 bit, what a wait for memory and a barrier take,
and on B200 the rate of `mma.sync`, taken to be that of the A100 a multiprocessor and clock.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """A card. clock in GHz; memory, l2 in bytes a second; half: FLOP a second of a 16-bit product with fp32
    sums; cublas: the share of it that a large product reaches. int4, int8, fp4: codes multiplied a cycle by
    the tensor core of a sub-core, four of which a multiprocessor has; 0 where none does. fma: cycles between
    two FP32 instructions of a warp. shared_kib, warps: of a multiprocessor."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    half: float
    int8: int
    int4: int
    memory: float
    l2: float
    fma: int
    shared_kib: int
    warps: int
    cublas: float = 0.9
    fp4: int = 0

    def peak(self, codes: int) -> float:
        """Operations a second of all tensor cores at so many codes a cycle, two a product."""
        return 8e9 * self.clock * self.multiprocessors * codes


CARDS = {
    card.name: card
    for card in (
        Throughput("RTX 2080 Ti", 75, 68, 1.635, 56.9e12, 256, 512, 616e9, 1.5e12, 2, 64, 32),
        Throughput("A100", 80, 108, 1.41, 312e12, 512, 1024, 1555e9, 5.0e12, 2, 164, 64, 0.85),
        Throughput("RTX 3090", 86, 82, 1.695, 71.2e12, 256, 512, 936e9, 1.9e12, 1, 100, 48),
        Throughput("RTX 4090", 89, 128, 2.52, 165.2e12, 256, 512, 1008e9, 5.0e12, 1, 100, 48),
        Throughput("H100", 90, 132, 1.83, 989.4e12, 1024, 0, 3350e9, 5.5e12, 1, 228, 64, 0.7),
        Throughput("B200", 100, 148, 1.85, 2250e12, 512, 0, 8000e9, 9.0e12, 1, 228, 64, 0.75),
        Throughput("RTX 5090", 120, 170, 2.407, 209.5e12, 256, 0, 1792e9, 6.0e12, 1, 100, 48, fp4=512),
    )
}


def card_named(name: str) -> Throughput:
    """The card of this name, in any case; ValueError with the names that are known."""
    found = next((c for key, c in CARDS.items() if key.lower() == name.strip().lower()), None)
    if found is None:
        raise ValueError(f"{name}: no such card is modelled, known are {', '.join(CARDS)}")
    return found
