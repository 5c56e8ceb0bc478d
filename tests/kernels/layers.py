"""Random layers and inputs for the kernels' tests, and the error of an output."""

from contextlib import contextmanager
from unittest import mock

import torch

from comfyui_nibble.kernels.dispatch import quant_linear
from comfyui_nibble.kernels.lora import with_lora
from comfyui_nibble.kernels.operator.codes import NVFP4, four_bits
from comfyui_nibble.kernels.operator.packing import pack, unpack
from comfyui_nibble.kernels.operator.quantizers import code_range
from comfyui_nibble.kernels.operator.spec import GELU_SHIFT, ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.quant_linear import fused, naive
from comfyui_nibble.kernels.target import interpreter
from comfyui_nibble.tests.codes import Codes, taken
from comfyui_nibble.tests.support import relative_error

G64_ACT, G64_WEIGHT = ActivationSpec(), WeightSpec()
NVFP4_WEIGHT, NVFP4_ACT = four_bits(NVFP4)
TOKEN, CHANNEL = ActivationSpec(granularity="token"), WeightSpec(granularity="channel")
UNSIGNED = ActivationSpec(unsigned=True, shift=GELU_SHIFT)
LIMIT = {
    torch.float16: 5e-4,
    torch.bfloat16: 6e-3,
}  # error of an output: its own rounding and that of the low rank
UNIT = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}  # what a rounding moves a value by, relative, at most


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
        elif name == "weight_scale" and spec.grid == NVFP4:
            out[name] = (torch.rand(shape, generator=g) + 0.5).to(torch.float8_e4m3fn)
        elif name in ("weight_scale", "smooth_factor", "outer_scale"):
            kept = torch.float32 if name == "outer_scale" else dtype
            out[name] = (torch.rand(shape, generator=g) + 0.5).to(kept)
        else:
            out[name] = torch.randn(shape, generator=g).to(dtype)
    return out


def _packed(rows, part, codes, g):
    if part.grid == NVFP4:  # any byte is two codes
        return torch.randint(-128, 128, (rows, part.bytes_per_row), generator=g).to(torch.int8)
    top = 2 ** (part.weight.bits - 1)
    shape = (rows, part.width)
    return pack(
        torch.randint(-top, top, shape, generator=g) if codes is None else torch.full(shape, codes),
        part.weight.bits,
    )


def inputs(m, k, dtype=torch.float32, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_branches(x, spec, tensors, lora=(), prologue=None, target=None):
    """quant_linear of a layer with LoRA branches, as the product runs them: more columns of its low rank."""
    return quant_linear(x, *with_lora(spec, tensors, lora, x.dtype), prologue, target)


def output_error(y, x, spec, tensors, lora=()):
    """|y - naive| over |naive| or, where the terms cancel, over the largest of them: y is rounded once, each
    low-rank term before."""
    want = naive.quant_linear(x, spec, tensors, lora).double()
    terms = [want] + [x.float() @ down.float().T @ up.float().T for down, up, _ in lora]
    for i, p in enumerate(spec.parts if spec.rank else ()):
        up = tensors["proj_up"][:, i * spec.rank : (i + 1) * spec.rank].float()
        terms.append(x[:, p.start : p.stop].float() @ tensors["proj_down"][p.start : p.stop].float() @ up.T)
    return float((y.double() - want).norm() / max(1e-30, *(t.norm() for t in terms)))


@contextmanager
def kernels_codes():
    """The codes of what the kernels' quantizer is given within, part by part."""
    codes, real = Codes(), fused.quantize

    def quantize(x, plan, launch, *rest):
        (out, scale), step = real(x, plan, launch, *rest), launch.gemm
        natural = (
            out.unflatten(1, (step.planes, -1)).transpose(1, 2).flatten(1) if step.planes else unpack(out, 4)
        )
        codes.calls += natural.split([part.width for part in step.parts], 1)
        return out, scale

    with mock.patch.object(fused, "quantize", quantize):
        yield codes


def check_on_equal_codes(x, spec, tensors, lora=(), prologue=None, roundings=0):
    """The layer in the interpreter against naive on the codes of the kernels' quantizer, each a code that
    naive's own value rounds to.

    roundings: how many roundings to the dtype of x part the values of the two before the codes: each moves a
    value and its scale by UNIT of the largest value, and the output by LIMIT.
    """
    with kernels_codes() as codes:
        y = with_branches(x, spec, tensors, lora, prologue, interpreter())
    with taken(codes) as took:
        want = naive.quant_linear(x if prologue is None else prologue(x), spec, tensors, lora)
    assert took.at == len(codes.calls) > 0
    top = max(code_range(p.activation.bits, p.activation.unsigned)[1] for p in spec.parts)
    assert took.edge < 2 * roundings * UNIT[x.dtype] * top + 1e-5
    assert relative_error(want, y) < (1 + roundings) * LIMIT[x.dtype]
