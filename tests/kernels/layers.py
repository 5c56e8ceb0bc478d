"""Random layers and inputs for the kernels' tests, and the error of an output."""

import torch

from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.quant_core.packing import pack
from comfyui_nibble.quant_core.spec import GELU_SHIFT, ActivationSpec, LinearSpec, PartSpec, WeightSpec

G64_ACT, G64_WEIGHT = ActivationSpec(), WeightSpec()
TOKEN, CHANNEL = ActivationSpec(granularity="token"), WeightSpec(granularity="channel")
UNSIGNED = ActivationSpec(unsigned=True, shift=GELU_SHIFT)
LIMIT = {torch.float16: 5e-4, torch.bfloat16: 6e-3}  # error of an output: its own rounding and that of the low rank


def spec_of(k, n, act=G64_ACT, weight=G64_WEIGHT, bias=True, **kwargs):
    return LinearSpec(k, n, (PartSpec(0, k, weight, act, **kwargs),), bias)


def side_by_side(n, *parts, bias=True, **kwargs):
    """A layer of parts (width, activation, weight)."""
    out, edge = [], 0
    for width, act, weight in parts:
        out.append(PartSpec(edge, edge + width, weight, act, **kwargs))
        edge += width
    return LinearSpec(edge, n, tuple(out), bias)


def random_tensors(spec, seed=0, codes=None, dtype=torch.float32):
    """Tensors of a layer. codes: the one code of all weights."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in spec.shapes().items():
        if name == "weight":
            out[name] = torch.cat([_packed(spec.out_features, p, codes, g) for p in spec.parts], 1)
        elif name in ("weight_scale", "smooth_factor"):
            out[name] = (torch.rand(shape, generator=g) + 0.5).to(dtype)
        else:
            out[name] = torch.randn(shape, generator=g).to(dtype)
    return out


def _packed(rows, part, codes, g):
    top = 2 ** (part.weight.bits - 1)
    shape = (rows, part.width)
    return pack(torch.randint(-top, top, shape, generator=g) if codes is None else torch.full(shape, codes), part.weight.bits)


def inputs(m, k, dtype=torch.float32, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def output_error(y, x, spec, tensors, lora=()):
    """|y - naive| over |naive| or, where the terms cancel, over the largest of them: y is rounded once, each low-rank term before."""
    want = naive.quant_linear(x, spec, tensors, lora).double()
    terms = [want] + [x.float() @ down.float().T @ up.float().T for down, up, _ in lora]
    for i, p in enumerate(spec.parts if spec.rank else ()):
        up = tensors["proj_up"][:, i * spec.rank : (i + 1) * spec.rank].float()
        terms.append(x[:, p.start : p.stop].float() @ tensors["proj_down"][p.start : p.stop].float() @ up.T)
    return float((y.double() - want).norm() / max(1e-30, *(t.norm() for t in terms)))
