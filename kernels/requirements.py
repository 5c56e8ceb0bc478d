"""What a layer and a machine must have for each implementation of the operator.

A requirement is a function of (spec, target) that returns the reason against a path, or None.
"""

import torch

from . import fp4
from .cards import INT4, M8N8K32
from .operator.codes import NVFP4
from .plan import has_groups, kernel_of
from .target import MIN_INT4, MIN_TRITON
from .tuning import kronecker_limits, kronecker_tile, low_rank_limit

TORCH_INT8, FP4 = "int8 products of torch", "fp4 tensor cores"


def _gpu(spec, target):
    if target.backend == "cpu" and not target.interpreted:
        return "needs a GPU"
    return None


def _triton(spec, target):
    if target.triton is None:
        return target.trouble or "Triton is not installed"
    wanted, found = ".".join(map(str, MIN_TRITON)), ".".join(map(str, target.triton))
    return None if target.triton >= MIN_TRITON else f"needs Triton {wanted}, found {found}"


def _int4_products(spec, target):
    if target.card.int4:
        return None
    return f"{', '.join(f'sm_{capability}' for capability in INT4)} only, this is {target}"


def _int8_products(spec, target):
    if target.card.int8:
        return None
    if target.backend == "hip":
        return f"no int8 matrix cores on {target.arch}"
    return f"Triton has no int8 product for sm_{target.arch}"


def _fp4_products(spec, target):
    return fp4.refused(target)


def _every(text, accept):
    """A requirement on each part: `accept` it, or `text`, formatted with the part, is the reason."""

    def check(spec, target):
        bad = next((p for p in spec.parts if not accept(p)), None)
        return None if bad is None else text.format(p=bad, a=bad.activation, w=bad.weight)

    return check


_QUANTIZED = _every("weight-only layer", lambda p: p.activation is not None)
_WEIGHT_ONLY = _every("activations are quantized", lambda p: p.activation is None)
_NO_TENSOR_SCALE = _every(
    "one activation scale for a whole tensor",
    lambda p: p.activation is None or p.activation.granularity != "tensor",
)
_GROUPS = _every(
    "groups of {w.group} weights or of {a.group} activations, not 64",
    lambda p: (
        (p.weight.granularity != "group" or p.weight.group == 64)
        and (p.activation.granularity != "group" or p.activation.group == 64)
    ),
)
_WEIGHT_GROUPS = _every(
    "groups of {w.group} weights, not 64", lambda p: p.weight.granularity != "group" or p.weight.group == 64
)
_FP4_CODES = _every("integer activations", lambda p: p.activation.grid == NVFP4)
_OUTER_SCALE = _every(
    "one outer scale for the tensor that a rotation or principal components leave",
    lambda p: p.activation.outer == "token" or p.activation.fixed or not (p.rotation or p.principal),
)
_WHOLE_TILES = _every("{p.width} channels, not a multiple of 64", lambda p: p.width % 64 == 0)
_ROTATION = _every("Hadamard blocks of {p.rotation} channels, above 256", lambda p: p.rotation <= 256)
_SIGNED_8 = _every(
    "unsigned 8-bit codes do not fit into int8",
    lambda p: not (p.activation and p.activation.unsigned and p.activation.bits == 8),
)


def _principal(spec, target):
    """In fp16 x D is scaled so that it cannot overflow, and what it takes out of x would be, too. Where the
    low rank does not fit beside a rotation, components do not either: 20 to 100 spills on RDNA."""
    some = [p for p in spec.parts if p.principal]
    if some and torch.bfloat16 not in target.dtypes:
        return "principal components in fp16"
    bad = next((p for p in some if p.principal > low_rank_limit(target, p.rotation)), None)
    return bad and f"{bad.principal} principal components beside Hadamard blocks of {bad.rotation} channels"


_INT4_CODES = _every(
    "W{w.bits}A{a.bits} is not 4 bit on both sides", lambda p: p.weight.bits == 4 and p.activation.bits <= 4
)


def _edges(spec, target):
    """Parts that share a launch must begin where a block of bytes and, on the way to one, a group of 64
    does."""
    if len(spec.parts) == 1:
        return None
    need = max(64, 32 * 8 // min(p.weight.bits for p in spec.parts))
    bad = next((p for p in spec.parts if p.width % need), None)
    return None if bad is None else f"a slice of {bad.width} channels, not a multiple of {need}"


def _wide_groups(spec, target):
    """The step of a product is one group where there are groups, and on CUDA at least 32 bytes."""
    if target.backend == "cuda" and any(has_groups(p) and p.weight.bits == 2 for p in spec.parts):
        return "a group of 64 2-bit weights has 16 bytes, an int8 product takes 32"
    return None


def _products_16(spec, target):
    return (
        None if target.card.products_16 else f"Triton has no 16-bit tensor-core product for sm_{target.arch}"
    )


def _whole_bytes(spec, target):
    """Rows of a slice begin at whole bytes of packed codes."""
    bad = next(
        (p for p in spec.parts if p.kronecker and p.kronecker[1] % 2 and not kernel_of(p, target)[1]), None
    )
    return (
        None
        if bad is None
        else f"slices of {_sizes(bad)} channels, odd rows of which two codes of one byte would be in two"
    )


def _tile_of_transform(spec, target):
    for part in (p for p in spec.parts if p.kronecker):
        p1, p2 = part.kronecker
        tile = kronecker_tile(target, p1, p2, part.width // (p1 * p2), part.per_slice)
        side, values = kronecker_limits(target, tile)
        if max(tile.sides) > side or tile.values > values:
            padded = f"{tile.slices} slices of {tile.sides[0]} x {tile.sides[1]} after padding"
            return f"{padded}, above {side} a side or {values} values a token"
        if tile.shared > target.shared_bytes:
            found = f"{target} has {target.shared_bytes >> 10}"
            return f"slices of {_sizes(part)} channels take {tile.shared >> 10} KiB of shared memory, {found}"
    return None


def _sizes(part):
    return " x ".join(map(str, part.kronecker))


def _int4_triton(spec, target):
    if target.triton < MIN_INT4:
        return f"needs Triton {'.'.join(map(str, MIN_INT4))}, found {'.'.join(map(str, target.triton))}"
    return None


def _turing_groups(spec, target):
    """Turing's kernel reads whole groups of 64."""
    bad = next((p for p in spec.parts if p.width % 64), None)
    fits = target.card.int4 != M8N8K32 or bad is None
    return None if fits else f"{bad.width} channels, not a multiple of 64"


def _torch_int8(spec, target):
    if target.card.torch_int8:
        return None
    if target.backend == "cpu":
        return "needs x86 with VNNI or AMX, where torch's int8 product is exact"
    return f"no int8 product of torch's is known to be fast on {target}"


_ONE_SCALE = _every(
    "scales of groups",
    lambda p: "group" not in (p.weight.granularity, p.activation and p.activation.granularity),
)


def _multiples_of_8(spec, target):
    """As CUDA's product asks for."""
    odd = next((n for n in (spec.out_features, *(p.width for p in spec.parts)) if n % 8), None)
    return None if target.backend == "cpu" or odd is None else f"{odd} channels, not a multiple of 8"


BASE = (_gpu, _triton)
_QUANT = (*BASE, _QUANTIZED, _NO_TENSOR_SCALE, _GROUPS, _ROTATION, _principal)

# Of a learned transform inside the quantizer; otherwise torch transforms x in front of it.
FUSED = "transform in the quantizer"
FUSED_TRANSFORM = (
    _QUANTIZED,
    _products_16,
    _every(
        "one activation scale each {a.group} channels",
        lambda p: not p.kronecker or p.activation.granularity == "token",
    ),
    _whole_bytes,
    _tile_of_transform,
)

# Fastest first. That of FP4 is the only one for layers on the nvfp4 grid, and for no others.
PATHS = {
    FP4: (
        *BASE,
        _QUANTIZED,
        _FP4_CODES,
        _fp4_products,
        _OUTER_SCALE,
        _WHOLE_TILES,
        _ROTATION,
        _principal,
    ),
    "int4 tensor cores": (
        *_QUANT,
        _int4_products,
        _INT4_CODES,
        _edges,
        _int4_triton,
        _turing_groups,
    ),
    "int8 tensor cores": (*_QUANT, _int8_products, _SIGNED_8, _edges, _wide_groups),
    "weight-only kernel": (*BASE, _WEIGHT_ONLY, _WEIGHT_GROUPS),
    TORCH_INT8: (_torch_int8, _ONE_SCALE, _NO_TENSOR_SCALE, _SIGNED_8, _multiples_of_8),
}
