"""Formats that this pack does not read, told from a file's header and its declarations: what the file is, and
what loads it instead."""

from collections.abc import Callable

import torch

from ..store.safe import CheckpointError
from .kitchen import declared
from .kitchen.declared import MXFP8, DeclarationError, NotJsonError
from .scaled import FP8, WEIGHT_SCALES

_UNDECLARED = (
    "ComfyUI has such layers, but this file does not declare them (comfy_quant): take the file made for "
    "ComfyUI"
)
_BF16 = "take the model in 16 bit, or in fp8 with a scale a tensor or a row"
_BITSANDBYTES = "bitsandbytes", f"diffusers loads it, and ComfyUI with a pack for bitsandbytes; {_BF16}"
# Last pieces of keys that no other format has: {piece: (what it is, what to do)}.
_LEAVES = {
    "weight_scale_inv": (
        "block-wise fp8 (DeepSeek's: a scale a block)",
        f"transformers and vLLM read it, ComfyUI does not; {_BF16}",
    ),
    "weight_packed": ("compressed-tensors", f"vLLM reads it, ComfyUI does not; {_BF16}"),
    "qzeros": ("GPTQ or AWQ with zero points", f"transformers and vLLM read it, ComfyUI does not; {_BF16}"),
    "absmax": _BITSANDBYTES,
    "SCB": _BITSANDBYTES,
}
_MIGRATE = (
    "its --convert-int8-scaled writes the same layers with comfy_quant declarations, which ComfyUI and this "
    "pack read where a scale is a tensor's or a row's; or take the model in 16 bit"
)
_OF_COMFYUI = {"weight_scale_2": "nvfp4", "weight_s_rel": "asym_w4a8_int8"}


def require_leaves(path, shapes: dict, dtypes: dict[str, str], header: str | None):
    """Raises CheckpointError where the tensors beside a weight are those of a format that this pack does not
    read, or only where it is declared.

    shapes, dtypes: {key: of its tensor}. header: the file's declarations, or None.
    """
    for key, dtype in dtypes.items():
        name, _, leaf = key.rpartition(".")
        scale_of_fp8 = leaf in WEIGHT_SCALES and dtypes.get(f"{name}.weight") in FP8.values()
        if leaf in _LEAVES:
            what, advice = _LEAVES[leaf]
        elif leaf in _OF_COMFYUI or (scale_of_fp8 and dtype in ("F8_E8M0", "U8")):
            if header is not None or f"{name}.{declared.LEAF}" in dtypes:
                continue
            what, advice = _OF_COMFYUI.get(leaf, "mxfp8"), _UNDECLARED
        elif leaf in WEIGHT_SCALES and _undeclared_int8(name, dtypes, header):
            what, advice = "int8 that is not declared (older files of convert_to_quant)", _MIGRATE
        elif scale_of_fp8 and len(shapes[key]) == 2 and shapes[key][1] > 1:
            what, advice = "block-wise fp8 (a scale a block)", f"ComfyUI does not read it; {_BF16}"
        else:
            continue
        found = f"{key}: {dtype} {list(shapes[key])}"
        raise CheckpointError(
            f"{path}: its weights are in {what}, which this pack does not read (found {found}): {advice}."
        )


def _undeclared_int8(name, dtypes, header) -> bool:
    return dtypes.get(f"{name}.weight") == "I8" and header is None and f"{name}.{declared.LEAF}" not in dtypes


def require_declarations(
    path, shapes, dtypes, read: Callable[[str], torch.Tensor], header: str | None, prefix: str
) -> dict[str, declared.Declaration | None]:
    """{layer: its Declaration, None where it has one that is no JSON}. Raises CheckpointError for layers
    declared in a format that this pack does not read or know. Keys are without `prefix`."""

    def checked(where, parse):
        try:
            return parse()
        except DeclarationError as error:
            raise CheckpointError(f"{path}: {where}: {error}.") from error

    found, entry = {}, f"header entry {declared.HEADER!r}"
    for name, raw in checked(entry, lambda: declared.entries(header)).items():
        if f"{(own := name.removeprefix(prefix))}.weight" in dtypes:
            found[own] = checked(f"{entry}, layer {name[:200]}", lambda raw=raw: declared.parse(raw))
    for key in dtypes:
        name, _, leaf = key.rpartition(".")
        if leaf == declared.LEAF:
            found[name] = checked(
                key, lambda key=key: _of_tensor(shapes[key], dtypes[key], lambda: read(key))
            )
    for name, declaration in found.items():
        dtype = dtypes.get(f"{name}.weight")
        if declaration is not None and dtype in FP8.values() and declaration.format not in (*FP8, MXFP8):
            raise CheckpointError(
                f"{path}: {name}.weight: declared as {declaration.format}, found {dtype}. Export the file "
                "again."
            )
    return found


def _of_tensor(*stored):
    """None for what is no JSON: a weight in fp8 says by its dtype what it is, and any other weight is no
    source."""
    try:
        return declared.of_tensor(*stored)
    except NotJsonError:
        return None
