"""Which implementation of the operator a layer takes, and why each faster one was refused.

A path is a name and a tuple of requirements. A requirement is a function of (spec, target) that returns the
reason against the path, or None. Adding a card or a kernel is adding a row.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn.functional import pad

from .cards import INT4, M8N8K32
from .fp16 import HALF, balanced_parts, row_power
from .operator.compiling import constant_when_compiled
from .operator.spec import LinearSpec, parse
from .operator.transforms import transform_activation
from .plan import has_groups, kernel_of
from .quant_linear import eager, op, torch_int8
from .target import MIN_INT4, MIN_TRITON, Target, target_of
from .tuning import kronecker_limits, kronecker_tile

_TRANSFORMED = "x transformed by torch"
TORCH_INT8 = "int8 products of torch"
ROW_LIMIT = (
    64  # rows of x up to which the weight-only kernel, bound by reading the weights, beats dequantizing them
)


@dataclass(frozen=True)
class Choice:
    """`path` runs. `refused` names the faster paths and the reason against each."""

    path: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self):
        return self.path + "".join(f"; {name}: {reason}" for name, reason in self.refused)


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
_ROTATION = _every("Hadamard blocks of {p.rotation} channels, above 256", lambda p: p.rotation <= 256)
_SIGNED_8 = _every(
    "unsigned 8-bit codes do not fit into int8",
    lambda p: not (p.activation and p.activation.unsigned and p.activation.bits == 8),
)
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


_BASE = (_gpu, _triton)
_QUANT = (*_BASE, _QUANTIZED, _NO_TENSOR_SCALE, _GROUPS, _ROTATION)

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

# Fastest first.
PATHS = {
    "int4 tensor cores": (
        *_QUANT,
        _int4_products,
        _INT4_CODES,
        _edges,
        _int4_triton,
        _turing_groups,
    ),
    "int8 tensor cores": (*_QUANT, _int8_products, _SIGNED_8, _edges, _wide_groups),
    "weight-only kernel": (*_BASE, _WEIGHT_ONLY, _WEIGHT_GROUPS),
    TORCH_INT8: (_torch_int8, _ONE_SCALE, _NO_TENSOR_SCALE, _SIGNED_8, _multiples_of_8),
}


@lru_cache(maxsize=4096)
def choose(spec: LinearSpec, target: Target | str = "cpu") -> Choice:
    """The path that `quant_linear` takes for a layer on a Target, or on the device of that name."""
    if isinstance(target, str):
        target = target_of(target) if target == "cpu" or torch.cuda.is_available() else Target("cpu")
    refused: dict[str, str] = {}
    for name, requirements in PATHS.items():
        if name == TORCH_INT8 and has_kernels(target):
            continue
        reason = _first(requirements, spec, target)
        if reason is None:
            learned = name != TORCH_INT8 and any(p.kronecker for p in spec.parts)
            if against := _first(FUSED_TRANSFORM, spec, target) if learned else None:
                refused[FUSED] = against
            return Choice(name, _summed_up(refused))
        refused[name] = reason
    return Choice("eager", _summed_up(refused))


def has_kernels(target):
    """Whether Triton runs here at all: torch's products are for where it does not."""
    return _first(_BASE, None, target) is None


def _summed_up(refused):
    """One line for Triton where one reason is against all of its kernels."""
    of_triton = [name for name in PATHS if name != TORCH_INT8]
    reasons = {refused.get(name) for name in of_triton}
    if len(reasons) > 1 or None in reasons:
        return tuple(refused.items())
    return (("triton", reasons.pop()), *((n, r) for n, r in refused.items() if n not in of_triton))


def _first(requirements, spec, target):
    return next((reason for check in requirements if (reason := check(spec, target))), None)


@constant_when_compiled
def _path(spec: str, device, dtype, asked: tuple | None) -> str:
    """`choose` by values on which torch.compile can guard: the spec's text, the dtype of x, the fields of the
    Target asked for. Where the path takes x transformed by torch, _TRANSFORMED."""
    return _path_of(spec, device, dtype, asked)


@lru_cache(maxsize=4096)
def _path_of(spec: str, device, dtype, asked: tuple | None) -> str:
    target = Target(*asked) if asked else target_of(device)
    choice = choose(parse(spec), target)
    if dtype not in (torch_int8.DTYPES if choice.path == TORCH_INT8 else target.dtypes):
        return "eager"
    return _TRANSFORMED if choice.path != "eager" and FUSED in dict(choice.refused) else choice.path


def quant_linear(x, spec, tensors, prologue=None, target=None):
    """y = operator(prologue(x)) for x (..., K), any float dtype -> (..., N) in that dtype. See
    `quant_linear.naive` for the formula.

    `prologue`: a `prologue.Prologue`, computed inside the activation quantizer where that is possible.
    `target`: `interpreter()` in tests; the device of x by default. NaN in a token of x gives NaN in that
    token of y. Raises ValueError where x and the layer do not fit or are on different devices.
    """
    if x.shape[-1] != spec.in_features:
        raise ValueError(f"the layer has {spec.in_features} in-channels, x has the shape {tuple(x.shape)}")
    if x.device != tensors["weight"].device:
        raise ValueError(
            f"x is on {x.device}, the layer's weight on {tensors['weight'].device}: move the layer to the "
            "device of x"
        )
    for name, shape in spec.weight_shapes:
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} should have the shape {shape} for {spec.describe()}, found "
                f"{tuple(tensors[name].shape)}"
            )
    if spec.padding:
        return _padded(x, spec, tensors, prologue, target)
    if spec.order:
        return _ordered(x, spec, tensors, prologue, target)
    rows = x.reshape(-1, spec.in_features)
    path = _path(spec.text, x.device, x.dtype, None if target is None else target.fields)
    if path == _TRANSFORMED:
        y = _transformed(rows, spec, tensors, prologue, target)
    elif path == TORCH_INT8 and not (torch.is_grad_enabled() and rows.requires_grad):
        y = torch_int8.quant_linear(rows if prologue is None else prologue(rows), spec, tensors)
    elif path in ("eager", TORCH_INT8) or (path == "weight-only kernel" and rows.shape[0] > ROW_LIMIT):
        y = eager.quant_linear(rows if prologue is None else prologue(rows), spec, tensors)
    else:
        y = op.quant_linear(rows, spec, tensors, prologue)
    return y.reshape(*x.shape[:-1], spec.out_features)


def _padded(x, spec, tensors, prologue, target):
    """A layer whose in-channels do not fill their last group: x gets the zeros that are missing, once, and no
    kernel knows of them."""
    zeros, rows = (0, spec.padding), x.reshape(-1, spec.in_features)
    if prologue is not None and not prologue.keeps_zero:
        rows, prologue = prologue(rows), None
    y = quant_linear(pad(rows, zeros), spec.without_padding(), tensors, prologue, target)
    return y.reshape(*x.shape[:-1], spec.out_features)


def _ordered(x, spec, tensors, prologue, target):
    """A layer with an order of its own: torch gathers the channels of x and of what is a matrix over the raw
    x."""
    order, rows = tensors["channel_order"], x.reshape(-1, spec.in_features)
    rows = (rows if prologue is None else prologue(rows)).index_select(1, order)
    plain = {k: t for k, t in tensors.items() if k != "channel_order"}
    y = quant_linear(rows, spec.without_order(), plain, target=target)
    return y.reshape(*x.shape[:-1], spec.out_features)


def _transformed(rows, spec, tensors, prologue, target):
    """A layer whose learned transform the quantizer does not take: torch smooths and transforms x, and the
    rest is a plain layer of what comes out. The low-rank branches see the raw x."""
    rows = rows if prologue is None else prologue(rows)
    if rows.dtype == HALF:
        return _transformed_in_range(rows, spec, tensors, target)
    pieces = []
    for (part, _, _, smooth), factors in zip(spec.split(tensors), spec.factors(tensors), strict=True):
        piece = rows[:, part.start : part.stop]
        if factors is not None:  # in fp32: bf16 between the two products doubles the codes that flip
            piece = transform_activation(piece.float(), smooth, 0, factors=factors).to(rows.dtype)
        pieces.append(piece)
    plain = {k: t for k, t in tensors.items() if k not in ("transform", "proj_down", "proj_up")}
    y = quant_linear(torch.cat(pieces, 1), spec.without_learned(), plain, target=target)
    for i, part in enumerate(spec.parts if spec.rank else ()):
        low = rows[:, part.start : part.stop] @ tensors["proj_down"][part.start : part.stop].to(rows.dtype)
        y.addmm_(low, tensors["proj_up"][:, i * spec.rank : (i + 1) * spec.rank].to(rows.dtype).T)
    return y


def _transformed_in_range(rows, spec, tensors, target):
    """`_transformed` in fp16: each token divided by a power of two, which changes no code, and y multiplied
    by it in the end."""
    # That of a divided token would be another one.
    if any(p.activation is not None and p.activation.shift for p in spec.parts):
        return eager.quant_linear(rows, spec, tensors)
    pieces = []
    for (part, _, _, smooth), factors in zip(spec.split(tensors), spec.factors(tensors), strict=True):
        piece = rows[:, part.start : part.stop].float()
        pieces.append(piece if factors is None else transform_activation(piece, smooth, 0, factors=factors))
    power = row_power(*(piece.abs() for piece in pieces))
    inverse = 1 / power
    plain = {k: t for k, t in tensors.items() if k not in ("transform", "proj_down", "proj_up", "bias")}
    x = torch.cat([(piece * inverse).to(HALF) for piece in pieces], 1)
    y = quant_linear(x, replace(spec.without_learned(), bias=False), plain, target=target)
    if spec.rank:
        down, up = balanced_parts(spec, tensors)
        low = torch.cat([rows[:, p.start : p.stop] @ down[p.start : p.stop] for p in spec.parts], -1)
        y.addmm_((low * inverse).to(HALF), up.T)
    if spec.bias:
        y.add_(tensors["bias"].float() * inverse)
    return y.mul_(power)
