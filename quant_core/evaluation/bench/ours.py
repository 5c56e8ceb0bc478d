"""The pack's own calls: the whole operator, its quantizer alone, its product alone."""

import torch

from ....kernels.dispatch import FUSED, choose, quant_linear
from ....kernels.operator.spec import LinearSpec
from ....kernels.quant_linear import fused, launch
from ....kernels.quant_linear.arguments import plan_of
from ....kernels.target import Target
from .cases import Case, Column, generator, random_input, random_tensors
from .timing import Work


def refusal(column: Column, n: int, k: int, target: Target) -> str:
    """Why no kernel of the pack takes this layer, "" if one does."""
    choice = choose(column.spec(n, k), column.target(target))
    if choice.path == "eager":
        return f"no kernel: {choice}"
    return dict(choice.refused).get(FUSED, "")


def operator(x, spec, tensors, target: Target, int8: bool = False):
    """quant_linear as a model calls it; with `int8`, planned for a card without native INT4."""
    return (
        fused.quant_linear(x, spec.text, tensors, target)
        if int8
        else quant_linear(x, spec, tensors, target=target)
    )


def quantized(x, spec, tensors, target: Target):
    """(codes, scale, low) of x for a layer that is one launch."""
    plan = plan_of(spec.text, target.fields)
    low = fused.empty_low(x, plan)
    return *fused.quantize(x, plan, plan.launches[0], tensors, low), low


def gemm_work(x, spec, tensors, target: Target) -> Work:
    """The product alone: the codes of x are made here, before the clock runs."""
    (step,) = plan_of(spec.text, target.fields).launches
    codes, scale, low = quantized(x, spec, tensors, target)
    y = torch.empty(x.shape[0], spec.out_features, dtype=x.dtype, device=x.device)

    def call(codes, scale, weight, weight_scale, low, up, bias):
        launch.gemm(codes, scale, weight, weight_scale, low, up, bias, y, *step.settings)
        return y

    return Work(
        call,
        (
            codes,
            scale,
            tensors["weight"],
            tensors["weight_scale"],
            low,
            tensors.get("proj_up"),
            tensors.get("bias"),
        ),
    )


def layer_of(
    case: Case, column: Column, dtype, device
) -> tuple[torch.Tensor, LinearSpec, dict[str, torch.Tensor]]:
    """(x, spec, tensors) of a case, the same at every call."""
    spec, g = column.spec(case.n, case.k), generator(case.seed, device)
    return random_input(case.m, case.k, dtype, device, g), spec, random_tensors(spec, dtype, device, g)


def work_of(column: Column, x, spec, tensors, target: Target) -> Work:
    """The call that a column times."""
    target = column.target(target)
    if column.kind == "gemm":
        return gemm_work(x, spec, tensors, target)
    if column.kind == "quantize":
        tensors = {
            name: tensors[name] for name in ("smooth_factor", "proj_down", "transform") if name in tensors
        }
        call = lambda x, held: quantized(x, spec, held, target)
    else:
        call = lambda x, held: operator(x, spec, held, target, column.int8)
    names = tuple(tensors)
    return Work(lambda x, *t: call(x, dict(zip(names, t, strict=True))), (x, *tensors.values()))
