"""What the kernels are held against: PyTorch's products and comfy-kitchen's operators. A builder returns a
Work or raises Refused."""

import importlib.util
from typing import cast

import torch
from torch.nn.functional import linear

from ....kernels.target import Target
from .answers import Refused
from .cases import RANK, Case, generator, random_input
from .timing import Work


def _check(ok, reason):
    if not ok:
        raise Refused(reason)


def _codes(rows, columns, device, g):
    """Normally distributed int8, as a scale of one absmax gives them."""
    return (torch.randn(rows, columns, device=device, generator=g) * 32).clamp_(-127, 127).to(torch.int8)


def torch_linear(case: Case, target: Target, dtype, device) -> Work:
    """linear with bias, in the kernels' 16-bit dtype."""
    g = generator(case.seed, device)
    weight = random_input(case.n, case.k, dtype, device, g) / case.k**0.5
    return Work(
        linear,
        (
            random_input(case.m, case.k, dtype, device, g),
            weight,
            random_input(1, case.n, dtype, device, g)[0],
        ),
        str(dtype),
    )


def torch_int8(case: Case, target: Target, dtype, device) -> Work:
    """torch._int_mm: int32 out, no scales, codes prepared."""
    _check(hasattr(torch, "_int_mm"), "this torch has no _int_mm")
    _check(
        case.m > 16 and case.n % 8 == 0 and case.k % 8 == 0,
        "needs more than 16 tokens and multiples of 8 channels",
    )
    g = generator(case.seed, device)
    return Work(
        lambda x, w: torch._int_mm(x, w.T),
        (_codes(case.m, case.k, device, g), _codes(case.n, case.k, device, g)),
    )


def torch_fp8(case: Case, target: Target, dtype, device) -> Work:
    """torch._scaled_mm: e4m3, one scale a tensor, 16-bit out with bias, values prepared."""
    _check(hasattr(torch, "_scaled_mm"), "this torch has no _scaled_mm")
    _check(target.backend == "cuda" and cast(int, target.arch) >= 89, f"no FP8 products on {target}")
    _check(case.n % 16 == 0 and case.k % 16 == 0, "needs multiples of 16 channels")
    g = generator(case.seed, device)
    x = random_input(case.m, case.k, dtype, device, g).to(torch.float8_e4m3fn)
    weight = random_input(case.n, case.k, dtype, device, g).to(torch.float8_e4m3fn)
    bias, one = (
        random_input(1, case.n, dtype, device, g)[0],
        torch.ones((), dtype=torch.float32, device=device),
    )
    run = lambda x, w, b: torch._scaled_mm(
        x, w.T, scale_a=one, scale_b=one, bias=b, out_dtype=dtype, use_fast_accum=True
    )
    return Work(run, (x, weight, bias))


TORCH = {"torch": torch_linear, "torch int8": torch_int8, "torch fp8": torch_fp8}


def kitchen_version() -> str:
    """ "" where comfy-kitchen is not installed."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return ""
    from importlib.metadata import version

    return version("comfy-kitchen")


def _kitchen():
    _check(kitchen_version(), "comfy-kitchen is not installed")
    import comfy_kitchen

    return comfy_kitchen


def _backend(op: str, kwargs: dict) -> str:
    """The backend that comfy-kitchen takes for a call. Its registry says why where it has none."""
    from comfy_kitchen.exceptions import NoCapableBackendError
    from comfy_kitchen.registry import registry

    try:
        return registry.get_capable_backend(op, kwargs)
    except NoCapableBackendError as e:
        raise Refused(f"comfy-kitchen: {e}") from e


def _packed(case: Case, device, g):
    return torch.randint(-128, 128, (case.n, case.k // 2), dtype=torch.int8, device=device, generator=g)


def kitchen_convrot(case: Case, target: Target, dtype, device) -> Work:
    """convrot_w4a4_linear: x rotated by blocks of 256 and quantized a token, weights (N, K / 2) with fp32
    scales (N,)."""
    ck = _kitchen()
    size = 256 if case.k % 256 == 0 else 64
    g = generator(case.seed, device)
    operands = {
        "x": random_input(case.m, case.k, dtype, device, g),
        "qweight": _packed(case, device, g),
        "wscales": torch.rand(case.n, device=device, generator=g) / case.k**0.5,
        "bias": random_input(1, case.n, dtype, device, g)[0],
    }
    settings = {"convrot_groupsize": size, "quant_group_size": 64, "linear_dtype": "int4"}
    note = f"{_backend('convrot_w4a4_linear', operands | settings)} backend, blocks of {size}"
    return Work(
        lambda x, w, s, b: ck.convrot_w4a4_linear(x, w, s, b, convrot_groupsize=size),
        tuple(operands.values()),
        note,
    )


def kitchen_svdquant(case: Case, target: Target, dtype, device) -> Work:
    """quantize_svdquant_w4a4 and scaled_mm_svdquant_w4a4: weights (N, K / 2), scales (K / 64, N), the low
    rank as ours."""
    ck = _kitchen()
    _check(case.k % 64 == 0, "needs multiples of 64 in-channels")
    g = generator(case.seed, device)
    x = random_input(case.m, case.k, dtype, device, g)
    smooth = torch.rand(case.k, device=device, generator=g).add_(0.5).to(dtype)
    scales = (torch.rand(case.k // 64, case.n, device=device, generator=g) / case.k**0.5).to(dtype)
    down, up = (
        random_input(case.k, RANK, dtype, device, g) / case.k**0.5,
        random_input(case.n, RANK, dtype, device, g),
    )
    bias = random_input(1, case.n, dtype, device, g)[0]
    kwargs = {
        "x": x,
        "smooth": smooth,
        "lora_down": down,
        "pad_size": 256,
        "act_unsigned": False,
        "lora_x": None,
    }

    def call(x, smooth, down, weight, scales, up, bias):
        codes, act_scales, low = ck.quantize_svdquant_w4a4(x, smooth, down)
        return ck.scaled_mm_svdquant_w4a4(codes, weight, act_scales, scales, low, up, bias)

    note = f"{_backend('quantize_svdquant_w4a4', kwargs)} backend"
    return Work(call, (x, smooth, down, _packed(case, device, g), scales, up, bias), note)


def kitchen_int8(case: Case, target: Target, dtype, device) -> Work:
    """int8_linear: x quantized a token, weights (N, K) with one scale a channel."""
    ck = _kitchen()
    g = generator(case.seed, device)
    operands = {
        "x": random_input(case.m, case.k, dtype, device, g),
        "weight": _codes(case.n, case.k, device, g),
        "weight_scale": torch.rand(case.n, device=device, generator=g) / case.k**0.5,
        "bias": random_input(1, case.n, dtype, device, g)[0],
    }
    settings = {"out_dtype": dtype, "convrot": False, "convrot_groupsize": 256, "input_act": None}
    note = f"{_backend('int8_linear', operands | settings)} backend"
    return Work(
        lambda x, w, s, b: ck.int8_linear(x, w, s, b, out_dtype=dtype), tuple(operands.values()), note
    )


KITCHEN = {
    "kitchen svdquant": kitchen_svdquant,
    "kitchen convrot": kitchen_convrot,
    "kitchen int8": kitchen_int8,
}
