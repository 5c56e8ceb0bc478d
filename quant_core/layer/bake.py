"""Writes what stands beside a quantized layer into the layer itself: more columns of its low-rank branch, or
as many as there is room for."""

from dataclasses import dataclass, replace

import torch

from .adapters import Side
from .linear import QuantizedLayer
from .lowrank import truncated
from .soundness import naming, require_finite_fit


class RankNeeded(ValueError):
    """A full-rank difference and no rank to cut it down to."""


@dataclass(frozen=True)
class Baked:
    """layer: with the side in it. error: of the baked weight, as a share of the norm of what the side adds to
    the weight."""

    layer: QuantizedLayer
    before: int
    error: float


def bake(layer: QuantizedLayer, side: Side, rank: int = 0, bias: torch.Tensor | None = None) -> Baked:
    """The layer with `side` merged; its packed codes are the same bytes. bias (N,): in the place of the
    layer's own.

    rank 0: every column is kept, and only the rounding to 16 bit is lost. Otherwise at most `rank` columns in
    all, the layer's own included: the best fit of the branch in the Frobenius norm, part by part, but for
    principal components, which stay. Kronecker products and dense differences need a rank; raises RankNeeded
    without one, UnfitLayer where the adapter's numbers leave fp32 or the dtype of the branch.
    """
    dtype = layer.tensors["proj_up"].dtype if layer.spec.rank else _half(layer)
    full = _residual(side)
    if full is not None and not rank:
        raise RankNeeded(
            f"layer {layer.name}: the adapter is of full rank ({side.describe()}), so a low-rank branch "
            "holds only a part of it. "
            "Set rank to at least 1, 64 for example; the report then states what is lost."
        )
    spec, changed = _exact(side).merged(layer, torch.float32)
    tensors = layer.tensors | changed
    if full is not None:  # the branch holds in-channels padded and in the order of the parts
        full = torch.nn.functional.pad(full, (0, spec.padding))
        full = full.index_select(1, tensors["channel_order"]) if spec.order else full
    if rank and (full is not None or spec.rank > rank):
        with naming(layer.name, full):
            spec, tensors = _cut(spec, tensors, full, rank)
    if "weight_scale" in changed:
        tensors["weight_scale"] = changed["weight_scale"].to(layer.tensors["weight_scale"].dtype)
    offset = tensors.pop("bias_offset", None)
    if spec.bias:
        tensors["bias"] = bias if bias is not None else tensors["bias"]
        if offset is not None:
            tensors["bias"] = tensors["bias"].float() + offset
    for name in ("proj_down", "proj_up"):
        if name in tensors:
            tensors[name] = tensors[name].to(dtype).contiguous()
    baked = QuantizedLayer(layer.name, spec, tensors)
    require_finite_fit(layer.name, baked)
    base = layer.dequantize()
    want = side.weight(base)
    return Baked(
        baked,
        layer.spec.rank,
        float((baked.dequantize() - want).norm() / (want - base).norm().clamp(min=1e-30)),
    )


def _half(layer) -> torch.dtype:
    return torch.float16 if layer.tensors["weight_scale"].dtype == torch.float16 else torch.bfloat16


def _exact(side: Side) -> Side:
    """What of a side goes into a layer's own tensors exactly: the gain and the low-rank terms."""
    return replace(side, kronecker=[], dense=None)


def _residual(side: Side):
    """The full-rank terms as one matrix (N, K); None without any."""
    if side.dense is None and not side.kronecker:
        return None
    rest = replace(side, gain=None, low_rank=[])
    return rest.weight(torch.zeros(side.out_features, side.in_features, device=side.device))


def _cut(spec, tensors, full, rank):
    """(spec, tensors) with the branch, plus the matrix `full` (N, K) or None, cut down to `rank` columns a
    part, of which principal components stay as they are."""
    downs, ups, most = [], [], max(p.principal for p in spec.parts)
    if rank <= most:
        raise RankNeeded(
            f"{most} columns of the low-rank branch are principal components, which stay: set rank to "
            f"{most + 1} at least, 64 for example."
        )
    rank = min(rank, spec.out_features, *(p.width for p in spec.parts))
    for i, part in enumerate(spec.parts):
        columns, pair, kept = slice(part.start, part.stop), None, None
        if spec.rank:
            up = tensors["proj_up"][:, i * spec.rank : (i + 1) * spec.rank].float()
            down = tensors["proj_down"][columns].float()
            kept = down[:, : part.principal], up[:, : part.principal]
            pair = down[:, part.principal :], up[:, part.principal :]
        if full is None:
            made = _recompressed(*pair, rank - part.principal)
        else:
            rows_of = lambda rows, pair=pair, columns=columns: (
                full[rows, columns] + (0 if pair is None else pair[1][rows] @ pair[0].T)
            )
            made = truncated(rows_of, (spec.out_features, part.width), rank - part.principal)
        v, u = made if kept is None else (torch.cat(two, 1) for two in zip(kept, made, strict=True))
        downs.append(v)
        ups.append(u)
    parts = tuple(replace(p, rank=rank) for p in spec.parts)
    return replace(spec, parts=parts), tensors | {"proj_down": torch.cat(downs), "proj_up": torch.cat(ups, 1)}


def _recompressed(down, up, rank):
    """The best rank-`rank` fit of up down^T for down (w, R), up (N, R), by the SVD of an R x R matrix."""
    (qd, rd), (qu, ru) = torch.linalg.qr(down), torch.linalg.qr(up)
    u, s, vh = torch.linalg.svd(ru @ rd.T)
    root = s[:rank].sqrt()
    return qd @ (vh[:rank].T * root), qu @ (u[:, :rank] * root)
