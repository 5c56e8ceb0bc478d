"""Which implementation of the operator a layer takes, and why each faster one was refused.

A path is a name and a tuple of `requirements`. Adding a card or a kernel is adding a row.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn.functional import pad

from .fp16 import HALF, balanced_parts, row_power
from .operator.codes import NVFP4
from .operator.compiling import constant_when_compiled
from .operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from .operator.text import parse
from .operator.transforms import transform_activation
from .quant_linear import eager, op, torch_int8
from .requirements import BASE, FP4, FUSED, FUSED_TRANSFORM, PATHS, TORCH_INT8
from .target import Target, target_of

_TRANSFORMED = "x transformed by torch"
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


def takes_components(target: Target) -> bool:
    """Whether layers of svdquant_p run there as those of svdquant_r do, with rotations of up to 256
    channels."""
    plain = PartSpec(0, 256, WeightSpec(4, "group"), ActivationSpec(4, "group"), rotation=256, rank=32)
    specs = [LinearSpec(256, 256, (replace(plain, principal=count),)) for count in (0, 32)]
    return len({choose(spec, target).path for spec in specs}) == 1


@lru_cache(maxsize=4096)
def choose(spec: LinearSpec, target: Target | str = "cpu") -> Choice:
    """The path that `quant_linear` takes for a layer on a Target, or on the device of that name."""
    if isinstance(target, str):
        target = target_of(target) if target == "cpu" or torch.cuda.is_available() else Target("cpu")
    refused: dict[str, str] = {}
    for name in _considered(spec):
        if name == TORCH_INT8 and has_kernels(target):
            continue
        reason = _first(PATHS[name], spec, target)
        if reason is None:
            learned = name != TORCH_INT8 and any(p.kronecker for p in spec.parts)
            if against := _first(FUSED_TRANSFORM, spec, target) if learned else None:
                refused[FUSED] = against
            return Choice(name, _summed_up(spec, refused))
        refused[name] = reason
    return Choice("eager", _summed_up(spec, refused))


def _considered(spec):
    """Names of the paths for codes of a layer's grid."""
    return [name for name in PATHS if (name == FP4) == (spec.grid == NVFP4)]


def has_kernels(target):
    """Whether Triton runs here at all: torch's products are for where it does not."""
    return _first(BASE, None, target) is None


def _summed_up(spec, refused):
    """One line for Triton where one reason is against all of its kernels."""
    of_triton = [name for name in _considered(spec) if name != TORCH_INT8]
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
    if dtype == HALF and any(p.principal for p in parse(spec).parts) and choice.path != TORCH_INT8:
        return "eager"
    return _TRANSFORMED if choice.path != "eager" and FUSED in dict(choice.refused) else choice.path


def quant_linear(x, spec, tensors, prologue=None, target=None):
    """y = operator(prologue(x)) for x (..., K), any float dtype -> (..., N) in that dtype. See
    `quant_linear.naive` for the formula.

    `prologue`: a `prologue.Prologue`, computed inside the activation quantizer where that is possible.
    `target`: `interpreter()` in tests; the device of x by default. NaN in a token of x gives NaN in that
    token of y, and in all of them where one scale is measured for all. Raises ValueError where x and the
    layer do not fit or are on different devices.
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
