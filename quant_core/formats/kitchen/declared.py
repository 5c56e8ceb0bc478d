"""What a file says of its quantized layers: `<layer>.comfy_quant` tensors and the `_quantization_metadata`
header (ComfyUI's, both).

All of it is untrusted: sizes and types are checked before anything is used.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..scaled import FP8

HEADER = "_quantization_metadata"
LEAF = "comfy_quant"
ROTATIONS = (256, 64, 16)  # comfy-kitchen's kernels; its `convrot_groupsize`
INT8_CHANNELS = 16  # its int8 products take a multiple of that many in-channels
NVFP4, MXFP8, W4A8 = BLOCKS = ("nvfp4", "mxfp8", "asym_w4a8_int8")  # a scale a block of in-channels
DENSE = (*FP8, MXFP8)  # read as 16-bit weights
SOURCES = (*FP8, *BLOCKS)  # of which 16-bit weights can be made, to quantize them anew
READ = ("svdquant_w4a4", "convrot_w4a4", "int8_tensorwise", "awq_w4a16", *SOURCES)
# Of convert_to_quant: names of its own for what is one of these, and what only its own nodes load.
ALSO = {"float8_e4m3fn_rowwise": "float8_e4m3fn", "hybrid_mxfp8": MXFP8}
TILES = ("int8_blockwise", "float8_e4m3fn_blockwise")
# Layers whose stored in-channels ComfyUI's model detection takes for a width of the model: SD, SDXL and
# LTX-Video; CogVideoX.
_WIDTH_READ = re.compile(r"(.*\.)?transformer_blocks\.0\.attn2\.to_k|blocks\.0\.norm1\.linear")
LONGEST, LONGEST_HEADER = 4096, 8 << 20  # bytes; comfy-quants writes 130 a layer


class DeclarationError(ValueError):
    """A declaration that cannot be followed; the text says why, and what was expected."""


class NotJsonError(DeclarationError):
    """A declaration of which nothing can be said."""


@dataclass(frozen=True)
class Declaration:
    """One layer. rotation: of convrot, 0 without. unsigned: svdquant's act_unsigned. activation_bits: of x, 0
    where it stays in 16 bit. group: in-channels of a scale of asym_w4a8_int8, 0 elsewhere."""

    format: str
    rotation: int = 0
    unsigned: bool = False
    activation_bits: int = 0
    group: int = 0

    def __str__(self):
        words = [
            self.format,
            f"rotation {self.rotation}" if self.rotation else "no rotation",
            f"{self.activation_bits or 16}-bit x",
        ]
        return ", ".join(words + ["unsigned"] * self.unsigned)


def width_is_read(name: str) -> bool:
    """Whether stock ComfyUI would take the model for another one if the layer's weight were packed, two codes
    a byte."""
    return _WIDTH_READ.fullmatch(name) is not None


def parse(raw: object) -> Declaration:
    """The Declaration of a layer's JSON. Raises DeclarationError.

    Values are taken as ComfyUI 0.33 takes them (comfy.ops, `_load_quantized_module`): switches are on where
    Python calls the value true, so null is off, sizes are what int() makes of it, and options are looked for
    at the top, then in "params".
    """
    if not isinstance(raw, dict):
        raise DeclarationError(f"expected an object, found {type(raw).__name__}")
    # comfy-quants' int8_w8a8 has no "format" and always "per_row".
    name = raw.get("format", "int8_tensorwise" if "per_row" in raw else None)
    name = ALSO.get(name, name) if isinstance(name, str) else name
    if name in TILES:
        raise DeclarationError(
            f"format {name!r} of convert_to_quant, a scale for each tile of rows and in-channels, which "
            "neither ComfyUI nor this pack computes: take the model in 16 bit, or with a scale a tensor or a "
            "row"
        )
    if name not in READ:
        raise DeclarationError(
            f"unknown format {str(name)[:40]!r}; known are {', '.join(READ)}. A newer ComfyUI-Nibble may "
            "read it"
        )
    option = _options(raw)
    whole = bool(raw.get("full_precision_matrix_mult"))  # ComfyUI looks for this one at the top only
    if name == "svdquant_w4a4":
        if option("lowrank_branch_input_basis", "raw") not in ("raw", None):
            raise DeclarationError(
                "its low rank acts on the smoothed input, expected 'raw' as comfy-kitchen computes: export "
                "it again with the raw basis"
            )
        return Declaration(name, unsigned=bool(option("act_unsigned", False)), activation_bits=4)
    if name == "awq_w4a16":
        if (size := _size(option, "group_size", 64)) != 64:
            raise DeclarationError(f"group_size: expected 64, found {size}")
        return Declaration(name)
    if name == "convrot_w4a4":
        kind = option("linear_dtype", "int4")
        if kind not in ("int4", "int8"):
            raise DeclarationError(f"linear_dtype: expected int4 or int8, found {str(kind)[:40]!r}")
        return Declaration(name, _rotation(option), activation_bits=0 if whole else int(kind[3:]))
    if name == "int8_tensorwise":
        return Declaration(
            name, _rotation(option) if option("convrot", False) else 0, activation_bits=0 if whole else 8
        )
    if name == W4A8:
        group = _size(option, "group_size", 16)
        if group < 4 or (16 % group and group % 16):
            raise DeclarationError(f"group_size: expected 4, 8 or a multiple of 16, found {group}")
        return Declaration(name, _rotation(option), activation_bits=0 if whole else 8, group=group)
    if name == NVFP4:
        return Declaration(name, activation_bits=0 if whole else 4)
    return Declaration(name)


def _options(raw):
    inner = raw.get("params")
    both = (inner if isinstance(inner, dict) else {}) | raw
    return both.get


def _size(option, key, default) -> int:
    value = option(key, default)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DeclarationError(f"{key}: expected int, found {str(value)[:40]!r}") from error


def _rotation(option):
    """Any power of 4: what comfy-kitchen's regular Hadamard matrices have. Its kernels are made for
    ROTATIONS."""
    size = _size(option, "convrot_groupsize", 256)
    if size < 4 or size & (size - 1) or size.bit_length() % 2 == 0:
        raise DeclarationError(
            f"convrot_groupsize: expected 16, 64 or 256, found {str(size)[:40]}, no power of 4"
        )
    return size


def of_tensor(shape: tuple[int, ...], dtype: str, read: Callable) -> Declaration:
    """The Declaration in a comfy_quant tensor. dtype: as safetensors calls it; read(): the tensor, not called
    before shape and dtype are right."""
    if dtype != "U8" or len(shape) != 1:
        raise DeclarationError(f"expected JSON as a row of uint8, found {dtype} {shape}")
    if not 0 < shape[0] <= LONGEST:
        raise DeclarationError(f"expected JSON of at most {LONGEST} bytes, found {shape[0]}")
    return parse(_json(bytes(read().tolist())))


def entries(text: str | None) -> dict[str, object]:
    """{layer: its JSON, not looked at} of the header entry, {} where there is none."""
    if text is None:
        return {}
    if len(text) > LONGEST_HEADER:
        raise DeclarationError(
            f"expected at most {LONGEST_HEADER >> 20} MiB of JSON, found {len(text)} characters"
        )
    data = _json(text)
    layers = data.get("layers") if isinstance(data, dict) else None
    if not isinstance(layers, dict):
        raise DeclarationError(f"expected an object with 'layers', found {text[:40]!r}")
    return layers


def of_header(text: str | None) -> dict[str, Declaration]:
    """{layer: Declaration} of the header entry, {} where there is none."""
    found = {}
    for name, raw in entries(text).items():
        try:
            found[name] = parse(raw)
        except DeclarationError as error:
            raise DeclarationError(f"layer {name[:200]}: {error}") from error
    return found


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(f"not JSON ({str(error)[:80]})") from error
