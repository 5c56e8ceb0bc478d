"""The tensors of a declared layer, as they lie in a file: which they are, and whether they have the shapes
and dtypes that a format asks for."""

from dataclasses import dataclass

from .declared import MXFP8, NVFP4, W4A8, Declaration

FLOATS = ("F16", "BF16", "F32")
SIXTEEN = ("F16", "BF16")
SIDE = ("proj_down", "proj_up", "smooth_factor")
# Our names of a format's tensors, and what files call them: comfy-kitchen and comfy-quants differ.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "svdquant_w4a4": {"weight_scale": ("weight_scale",)} | {leaf: (f"weight_{leaf}", leaf) for leaf in SIDE},
    "awq_w4a16": {"weight_scale": ("weight_scale",), "zeros": ("weight_zeros", "weight_zero")},
    NVFP4: {leaf: (leaf,) for leaf in ("weight_scale", "weight_scale_2")},
    W4A8: {leaf: (leaf,) for leaf in ("weight_s_rel", "weight_s_channel")},
}
PLAIN: dict[str, tuple[str, ...]] = {"weight_scale": ("weight_scale",)}
OPTIONAL = {
    NVFP4: ("pre_quant_scale", "input_scale"),
    W4A8: ("weight_codebook", "weight_correction"),
    MXFP8: ("weight_scalar",),  # hybrid_mxfp8's, for cards that would compute in plain fp8: not of the weight
}


class LayoutError(ValueError):
    """A layer whose tensors are not what its format asks for; the text names the tensor, what was expected
    and what was found."""


@dataclass(frozen=True)
class Stored:
    """A tensor in the file. dtype: as safetensors calls it."""

    key: str
    shape: tuple[int, ...]
    dtype: str


def gather(declared: Declaration, leaves: dict[str, Stored]) -> dict[str, Stored]:
    """The layer's tensors by our names. leaves: {last part of the key: Stored} of all that the file has under
    the layer's name.

    An input_scale is left out but for nvfp4: for all others kitchen takes x's range as it comes. Raises
    LayoutError for what is missing, twice there or unknown.
    """
    names = {"weight": ("weight",)} | NAMES.get(declared.format, PLAIN)
    optional = ("bias", *OPTIONAL.get(declared.format, ()))
    found = {leaf: leaves[leaf] for leaf in optional if leaf in leaves}
    for name, keys in names.items():
        there = [k for k in keys if k in leaves]
        if len(there) != 1:
            wanted = " or ".join(keys)
            raise LayoutError(
                f"{declared.format} asks for {wanted}, "
                + (f"found both {' and '.join(there)}" if there else "which is missing")
            )
        found[name] = leaves[there[0]]
    used = {s.key for s in found.values()}
    if unknown := sorted(
        leaf for leaf, s in leaves.items() if s.key not in used and leaf not in ("comfy_quant", "input_scale")
    ):
        raise LayoutError(
            f"{unknown[0]} is no tensor of {declared.format} and may change what the layer computes; "
            f"expected {', '.join(names)}"
        )
    return found


def check(stored, dims=None, shapes=None, dtypes=None):
    if dtypes is not None and stored.dtype not in dtypes:
        raise LayoutError(f"{stored.key}: expected the dtype {' or '.join(dtypes)}, found {stored.dtype}")
    if dims is not None and len(stored.shape) not in dims:
        raise LayoutError(
            f"{stored.key}: expected {' or '.join(map(str, dims))} dimensions, found the shape {stored.shape}"
        )
    if shapes is not None and stored.shape not in shapes:
        raise LayoutError(
            f"{stored.key}: expected the shape {' or '.join(map(str, shapes))}, found {stored.shape}"
        )
