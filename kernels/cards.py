"""What the kernels need to know of a card: a row each, so that a new one is one row."""

from dataclasses import dataclass, replace

MMA, M8N8K32 = "mma.m16n8k64.s4", "mma.m8n8k32.s4"  # the products of int4 that the pack has kernels for


@dataclass(frozen=True)
class Card:
    """A kind of card.

    shared_kib: shared memory that a block may use; compilation does not check it, a launch does.
    products_16: Triton has tensor-core products of 16 bits, bf16 among them. int8: and of int8. int4:
    MMA, M8N8K32 or "". wgmma: packed weights are the register operand of a wgmma. tcgen05: products of 4
    and 8 warps are tcgen05. waves_of_64: of AMD's CDNA. warp_values: what a warp holds of a learned
    transform's row; row_values, side: the most of a padded row, and of one side of its slices, before
    registers spill. branch_rotation: the largest Hadamard block beside which the quantizer has registers
    for the low rank; branch: whether it has a product for it at all. w8a8: layers with group scales run as
    W8A8, requantized at load, because the two FMA an output and group take more issue slots, or on sm_80
    more of its FP32 lanes, than the int8 product takes. torch_int8: `torch._int_mm` is
    exact and runs on instructions for int8.
    """

    shared_kib: int = 99
    products_16: bool = True
    int8: bool = True
    int4: str = ""
    wgmma: bool = False
    tcgen05: bool = False
    waves_of_64: bool = False
    warp_values: int = 1024
    row_values: int = 16384
    side: int = 128
    branch: bool = True
    branch_rotation: int = 4096
    w8a8: bool = False
    torch_int8: bool = False


_AMPERE = Card(torch_int8=True)
_BEFORE_AMPERE = Card(products_16=False, int8=False, branch=False)
_RDNA = Card(64, warp_values=512, row_values=4096, side=64, branch_rotation=64)
_CDNA = Card(64, waves_of_64=True, warp_values=2048, side=64)

# By compute capability.
CUDA = {
    75: replace(_BEFORE_AMPERE, shared_kib=64, int4=M8N8K32, torch_int8=True),
    80: replace(_AMPERE, shared_kib=163, int4=MMA, w8a8=True),
    86: replace(_AMPERE, shared_kib=99, int4=MMA),
    87: replace(_AMPERE, shared_kib=163, int4=MMA),
    89: replace(_AMPERE, shared_kib=99, int4=MMA),
    90: replace(_AMPERE, shared_kib=227, wgmma=True, w8a8=True),
    100: replace(_AMPERE, shared_kib=227, tcgen05=True),
    103: replace(_AMPERE, shared_kib=227, tcgen05=True),
    120: replace(_AMPERE, shared_kib=99),
    121: replace(_AMPERE, shared_kib=99),
}
# By how the name begins, the longest first.
HIP = {
    "gfx950": replace(_CDNA, shared_kib=160),
    "gfx94": _CDNA,
    "gfx95": _CDNA,
    "gfx9": replace(_CDNA, int8=False),
    "gfx11": replace(_RDNA, side=32),
    "gfx12": _RDNA,
    "gfx1": replace(_RDNA, int8=False),
    "": replace(_RDNA, int8=False, row_values=16384),
}
# A CPU by whether its int8 product is exact, see `target`.
CPU = {"int8": Card(torch_int8=True)}
INT4 = tuple(capability for capability, card in CUDA.items() if card.int4)


def card_of(backend: str, arch: int | str) -> Card:
    """The row of a card; one that nobody named takes what its generation surely has."""
    if backend == "hip":
        return next(card for name, card in HIP.items() if str(arch).startswith(name))
    if backend == "cuda" and isinstance(arch, int):
        return CUDA.get(arch, _BEFORE_AMPERE if arch < 80 else _AMPERE)
    return CPU.get(str(arch), Card())
