"""Weights of ComfyUI's formats in 16 bit, as a source or because no layer of the operator is one: fp8, and
those in blocks, nvfp4, mxfp8 and asym_w4a8_int8.

Source: comfy_kitchen/backends/eager of comfy-kitchen 0.2.31, whose dequantization in fp32 gives the same
values, and ComfyUI 0.33's comfy.ops for what a file calls its tensors.
"""

from collections.abc import Callable, Mapping
from math import lcm

import torch

from ....kernels.fp4.naive import decode_e2m1, decode_scales
from ....kernels.operator.packing import unpack
from ....kernels.operator.transforms import rotate
from ..scaled import FP8, real_values
from .declared import MXFP8, NVFP4, W4A8, Declaration
from .nvfp4 import swapped
from .stored import FLOATS, LayoutError, Stored, check
from .tiles import natural, tiled_shape
from .w4a8 import bits_of, codes_of

E4M3 = ("F8_E4M3", "U8")  # some files hold the bytes
# dB that a normal weight is from its original, as comfy-kitchen rounds it.
LOST = {NVFP4: 20, MXFP8: 31, W4A8: 23, "float8_e4m3fn": 31, "float8_e5m2": 26}
BLOCK = {NVFP4: 16, MXFP8: 32}  # in-channels of a scale


def shape_of(declared: Declaration, stored: dict[str, Stored]) -> tuple[int, int]:
    """(out-channels, in-channels) of a layer, once its tensors have been looked at. Raises LayoutError."""
    weight = stored["weight"]
    check(weight, dims=(2,))
    n, k = weight.shape
    if declared.format in FP8:
        check(weight, dtypes=(FP8[declared.format],))
        check(stored["weight_scale"], shapes=((), (1,), (n, 1)), dtypes=FLOATS)
        return n, k
    if declared.format == MXFP8:
        check(weight, dtypes=E4M3)
        _check_block(weight, k, BLOCK[MXFP8])
        check(stored["weight_scale"], shapes=(tiled_shape(n, k // BLOCK[MXFP8]),), dtypes=("F8_E8M0", "U8"))
        return n, k
    if declared.format == W4A8:
        return _grouped_shape(declared, stored, n, k)
    k *= 2
    check(weight, dtypes=("U8", "I8"))
    _check_block(weight, k, BLOCK[NVFP4])
    check(stored["weight_scale"], shapes=(tiled_shape(n, k // BLOCK[NVFP4]),), dtypes=E4M3)
    check(stored["weight_scale_2"], shapes=((), (1,)), dtypes=("F32",))
    if smooth := stored.get("pre_quant_scale"):
        check(smooth, shapes=((k,),), dtypes=FLOATS)
    if static := stored.get("input_scale"):
        check(static, shapes=((), (1,)), dtypes=FLOATS)
    return n, k


def _grouped_shape(declared, stored, n, width):
    """Of asym_w4a8_int8, whose rows of `width` bytes have codes of 4 or 6 bits."""
    weight, relative = stored["weight"], stored["weight_s_rel"]
    check(weight, dtypes=("I8", "U8"))
    check(relative, dims=(2,), dtypes=(*E4M3, "F32"))
    groups = relative.shape[1]
    k = groups * declared.group
    bits = bits_of(width, k)
    if not bits:
        raise LayoutError(
            f"{weight.key}: expected {k // 2} or {3 * k // 4} bytes a row, 4 or 6 bits for the {k} "
            f"in-channels of {relative.key}, found {width}"
        )
    _check_block(weight, k, lcm(16, declared.group, declared.rotation))
    check(relative, shapes=((n, groups),))
    check(stored["weight_s_channel"], shapes=((n,),), dtypes=FLOATS)
    if table := stored.get("weight_codebook"):
        if bits == 6:
            raise LayoutError(f"{table.key}: expected none with codes of 6 bits, which are whole numbers")
        check(table, shapes=((16,),), dtypes=FLOATS)
    if correction := stored.get("weight_correction"):
        check(correction, shapes=((groups, n),), dtypes=FLOATS)
    return n, k


def _check_block(weight, k, block):
    if not k or k % block:
        raise LayoutError(f"{weight.key}: expected in-channels in blocks of {block}, found {k}")


def lost_text(kinds: Mapping[str, int]) -> str:
    """A sentence on a source below 16 bit, "" on any other. kinds: {format: weights in it}."""
    if not kinds:
        return ""
    near = lambda kind: f" (about {LOST[kind]} dB from the original)" if kind in LOST else ""
    held = ", ".join(f"{count} weights in {kind}{near(kind)}" for kind, count in sorted(kinds.items()))
    return (
        f"The source has {held}: what rounding to that has lost, the result has lost too. Start from the "
        "16-bit file where there is one."
    )


def weight_of(declared: Declaration, get: Callable[[str], torch.Tensor | None]) -> torch.Tensor:
    """The real weight (N, K) in bf16. get: our name -> the file's tensor, None where there is none; what
    `shape_of` asks for is there."""
    return _in_fp32(declared, get).to(torch.bfloat16)


def _in_fp32(declared, get):
    values, smooth = _stored_values(declared, get), get("pre_quant_scale")  # ComfyUI multiplies x by it
    return values if smooth is None else values.float() * smooth.float()


def _stored_values(declared, get):
    weight = get("weight")
    if declared.format in FP8:
        return real_values(weight, get("weight_scale"))
    if declared.format == MXFP8:
        values = weight.view(torch.float8_e4m3fn).float()
        return _times(values, decode_scales(_rows(get("weight_scale").view(torch.uint8), values, 32)))
    if declared.format == NVFP4:
        values = decode_e2m1(unpack(swapped(weight), 4, unsigned=True)).float()
        scales = _rows(get("weight_scale").view(torch.float8_e4m3fn).float(), values, 16)
        return _times(values, get("weight_scale_2").float() * scales)
    return _grouped(declared, get)


def _grouped(declared, get):
    """asym_w4a8_int8, with its weight_correction."""
    k = get("weight_s_rel").shape[1] * declared.group
    real = codes_of(get, k).float() * get("weight_s_channel").float().unsqueeze(-1)
    if (correction := get("weight_correction")) is not None:
        real = real + correction.float().T.repeat_interleave(declared.group, dim=-1)
    return rotate(real, declared.rotation)


def _times(values, scales):
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1).to(values.dtype)).flatten(-2)


def _rows(scales, values, block):
    """Scales as a matrix (N, K / block)."""
    return natural(scales, values.shape[0], values.shape[1] // block)
