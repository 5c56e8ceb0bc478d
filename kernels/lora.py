"""LoRA as more columns of the low-rank branch: the kernels know one branch of any rank, and nothing is
quantized again."""

from dataclasses import replace

import torch


def with_lora(spec, tensors, lora, dtype):
    """(spec, tensors) of the layer with its LoRA branches. lora: triples (down (r, K), up (n, r), first
    out-channel), strength in `up`.

    A LoRA's down is of the raw x, also where the layer pads it or has an order of its own. The low-rank
    branch of part p is x_p D_p U_p, so each part gets its own channels of a LoRA's down and all of its up.
    """
    if not lora:
        return spec, tensors
    down = [torch.nn.functional.pad(d, (0, spec.padding)) for d, _, _ in lora]
    down = [(d.index_select(1, tensors["channel_order"]) if spec.order else d).to(dtype).T for d in down]
    up = [_placed(u.to(dtype), first, spec.out_features) for _, u, first in lora]
    if spec.rank:
        down.insert(0, tensors["proj_down"].to(dtype))
    ups = []
    for i in range(len(spec.parts)):
        if spec.rank:
            ups.append(tensors["proj_up"][:, i * spec.rank : (i + 1) * spec.rank].to(dtype))
        ups += up
    down = torch.cat(down, 1)
    parts = tuple(replace(p, rank=down.shape[1]) for p in spec.parts)
    return replace(spec, parts=parts), tensors | {"proj_down": down, "proj_up": torch.cat(ups, 1)}


def _placed(up, first, out_features):
    """up (n, r) as rows first..first + n of (N, r)."""
    if up.shape[0] == out_features:
        return up
    full = up.new_zeros(out_features, up.shape[1])
    full[first : first + up.shape[0]] = up
    return full
