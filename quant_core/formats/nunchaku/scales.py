"""The scales of a W4A4 layer's weight, from nunchaku's tensors and to them.

INT4 has `wscales`, 16 bit, one each 64 in-channels. NVFP4 has `wscales` in e4m3, one each 16, and above them
`wcscales` for each out-channel, 16 bit, and `wtscale`, one number; the weight is e2m1 * wscales * wcscales *
wtscale. Where one is absent it is 1 (`patch_scale_key`, `GEMM_W4A4` in src/Linear.cpp). deepcompressor
writes `wtscale` for a layer of its own and `wcscales` for layers whose rows it has stacked. The operator has
the product of the two as outer_scale.
"""

import torch

from ....kernels.operator.codes import NVFP4
from ....kernels.operator.spec import SpecError
from ...layer.linear import QuantizedLayer
from . import layout

OUTER = ("wcscales", "wtscale")


def loaded(get, has, rows: slice, groups: int, micro: bool) -> dict[str, torch.Tensor]:
    """weight_scale, and on NVFP4 outer_scale (1, N) fp32, of the out-channels `rows`, whole tiles of 128.

    get(leaf) -> tensor as stored; has: leaves that are there; groups: scales of a row; micro: NVFP4.
    """
    n = rows.stop - rows.start
    # Tiles of 128 rows lie behind each other, whatever the nominal shape.
    stored = get("wscales").flatten()[groups * rows.start : groups * rows.stop].view(groups, n)
    if not micro:
        return {"weight_scale": layout.unpack_scale(stored)}
    outer = torch.ones(n)
    if "wcscales" in has:
        outer = layout.unpack_vector(get("wcscales")[rows]).float()
    if "wtscale" in has:
        outer = outer * get("wtscale").float().reshape(1)
    return {"weight_scale": layout.unpack_micro_scale(stored), "outer_scale": outer[None]}


def stored(layer: QuantizedLayer, dtype: torch.dtype, short) -> tuple[dict[str, torch.Tensor], float]:
    """(nunchaku's tensors, by which share of itself the scale of a row is rounded, at most) of a layer of one
    part. short(tensor) -> it in `dtype`, 16 bit, or an error.

    Rows with one outer_scale get wtscale, in which nothing is rounded. Others get wcscales: powers of two, as
    the pack makes them, and what has been read from 16 bits are exact. Raises SpecError where fp16 has no
    room for rows so far apart.
    """
    if layer.spec.grid != NVFP4:
        return {"wscales": layout.pack_scale(short(layer.tensors["weight_scale"]))}, 0.0
    micro, (outer,) = layer.tensors["weight_scale"], layer.tensors["outer_scale"]
    out = {"wscales": layout.pack_micro_scale(micro)}
    if bool((outer == outer[0]).all()):
        whole = outer[:1].clone()
        exact = torch.equal(whole.to(dtype).float(), whole)
        return out | {"wtscale": whole.to(dtype) if exact else whole}, 0.0
    top = _power_of_two(outer) if dtype == torch.float16 else 1.0
    channels = (outer / top).to(dtype)
    # A row of zeros has any scale.
    counts = outer.isfinite() & (outer != 0) & (micro.float() != 0).any(1)
    change = (channels.float() * top / outer - 1)[counts].abs()
    worst = change.max().item() if len(change) else 0.0
    if worst > torch.finfo(dtype).eps:
        raise SpecError(
            f"layer {layer.name}: the scales of its out-channels are too far apart for {dtype}: from "
            f"{outer[counts].abs().min():.3g} to {outer[counts].abs().max():.3g}"
        )
    out["wcscales"] = layout.pack_vector(channels)
    return (out | {"wtscale": torch.full((1,), top)} if top != 1 else out), worst


def _power_of_two(outer: torch.Tensor) -> float:
    """The largest power of two that is no larger than the largest of `outer`.

    nunchaku's products are rounded to 16 bits between wtscale and wcscales: in fp16 they would be infinite
    without the first, while bf16 has the exponents of fp32.
    """
    largest = outer[outer.isfinite()].abs().max().item()
    return 2.0 ** (torch.frexp(torch.tensor(largest))[1].item() - 1) if largest else 1.0
