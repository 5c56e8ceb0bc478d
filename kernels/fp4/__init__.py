"""Products of block-scaled fp4 on Blackwell's tensor cores. Layers on the nvfp4 grid run on them; mxfp4 is
there as an operator that no LinearSpec reaches.

Values are e2m1, two a byte, the even channel in the low nibble. Scales are (rows, K / block), in that natural
order. Their dtype names the format: float8_e4m3fn, one per 16 channels, is nvfp4, which has an fp32 scale on
top; uint8, the exponents of e8m0, one per 32 channels, is mxfp4.
"""

from ..target import Target

# The first Triton that makes `tl.dot_scaled` of two fp4 operands one instruction. On sm_121 earlier ones
# decode to bf16 or fail.
MIN_TRITON = {100: (3, 6), 103: (3, 6), 120: (3, 6), 121: (3, 8)}


def refused(target: Target) -> str | None:
    """Why a Target cannot run these kernels, None if it can."""
    if target.interpreted:
        return None
    if target.backend != "cuda" or target.arch not in MIN_TRITON:
        return f"{', '.join(f'sm_{a}' for a in MIN_TRITON)} only, this is {target}"
    if target.triton is None:
        return target.trouble or "Triton is not installed"
    wanted, found = (".".join(map(str, v)) for v in (MIN_TRITON[target.arch], target.triton))
    return None if target.triton >= MIN_TRITON[target.arch] else f"needs Triton {wanted}, found {found}"
