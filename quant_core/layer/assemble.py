"""From a part's weight to stored tensors: the steps that methods share."""

from dataclasses import dataclass, field
from typing import cast

import torch

from ...kernels.operator import nvfp4
from ...kernels.operator.codes import NVFP4
from ...kernels.operator.quantizers import dequantize, quantize_activation
from ...kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec
from ...kernels.operator.transforms import fold_weight, transform_activation
from .chunks import row_chunks
from .linear import QuantizedLayer
from .problem import Fitted, Problem


def round_part(
    weight,
    part: PartSpec,
    smooth,
    scale_dtype,
    low_rank=None,
    factors=None,
    scale_of=None,
):
    """Codes (N, w) and scales (N, G) of fold(weight - U D^T), chunk by chunk. low_rank: (down (w, R), up (N,
    R)) or None."""
    n, width = weight.shape
    codes = torch.empty(n, width, dtype=torch.int8, device=weight.device)
    held = torch.float32 if part.weight.grid == NVFP4 else scale_dtype
    scales = torch.empty(n, part.scale_rows, dtype=held, device=weight.device)
    # A scale for the whole tensor needs the whole tensor.
    for rows in (
        [slice(None)] if part.weight.granularity == "tensor" else row_chunks(n, width, device=weight.device)
    ):
        chunk = folded(
            weight,
            rows,
            part,
            smooth,
            low_rank,
            factors,
        )
        codes[rows], scales[rows] = part.weight.rounded(chunk, scale_dtype, scale_of)
    return codes, scales


def folded(
    weight,
    rows,
    part: PartSpec,
    smooth,
    low_rank=None,
    factors=None,
) -> torch.Tensor:
    """fold(W - U D^T) of some rows, fp32."""
    chunk = weight[rows].float()
    if low_rank is not None:
        down, up = low_rank
        chunk = torch.addmm(chunk, up[rows].float(), down.float().T, alpha=-1)
    if smooth is None and factors is None and not part.rotation:
        return chunk
    return fold_weight(chunk, smooth, part.rotation, factors)


def folded_t(
    weight,
    part: PartSpec,
    smooth,
    low_rank=None,
    factors=None,
) -> torch.Tensor:
    """fold(W - U D^T) transposed, (w, N) fp32, as GPTQ wants it and uses it up."""
    out = torch.empty(weight.shape[1], weight.shape[0], device=weight.device)
    for rows in row_chunks(*weight.shape, device=weight.device):
        out[:, rows] = folded(
            weight,
            rows,
            part,
            smooth,
            low_rank,
            factors,
        ).T
    return out


def column_absmax(weight) -> torch.Tensor:
    """Largest magnitude of each in-channel of a weight (N, w), (w,) fp32."""
    return (
        torch.stack([weight[rows].abs().amax(0) for rows in row_chunks(*weight.shape, device=weight.device)])
        .amax(0)
        .float()
    )


def smoothing(
    x,
    w,
    alpha,
    beta,
    dtype,
) -> torch.Tensor:
    """s (..., w) = x^alpha / w^beta for statistics (w,) of the two sides, rounded to `dtype` before anything
    is folded with it, fp32. alpha, beta: numbers, or (..., 1) of many at a time."""
    s = x.clamp(min=1e-5).pow(alpha) / w.clamp(min=1e-5).pow(beta)
    # Mean log 0 keeps s in the range of fp16; the scales absorb the constant.
    return (s / s.log().mean(-1, keepdim=True).exp()).clamp(1e-3, 1e3).to(dtype).float()


def shift_correction(codes, scales, part: PartSpec, smooth) -> torch.Tensor:
    """What the shift of the activations adds to the output, (N,) fp32: sum_k (shift / s_k) Wq[n, k]."""
    out = torch.empty(codes.shape[0], device=codes.device)
    grain = "group" if scales.shape[1] > 1 else "channel"
    shift = cast(ActivationSpec, part.activation).shift
    per_channel = torch.full((part.width,), shift, device=codes.device)
    if smooth is not None:
        per_channel /= smooth.float()
    for rows in row_chunks(*codes.shape, device=codes.device):
        out[rows] = dequantize(codes[rows], scales[rows].float(), grain, part.weight.group) @ per_channel
    return out


@dataclass(frozen=True, eq=False)
class FittedPart:
    """A part of a layer as a method leaves it.

    codes (N, w) int8; scales (N, G). smooth (w,) fp32; low_rank: (down (w, R), up (N, R)); factors: (left,
    right) of a learned transform; each None without one. chosen: {choice: value} for the report, error: by
    which candidates are compared, both the method's own.
    """

    spec: PartSpec
    codes: torch.Tensor
    scales: torch.Tensor
    smooth: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    chosen: dict = field(default_factory=dict)
    error: float = 0.0


def outputs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T (R, N) fp32 for tokens x (R, w) fp32 and a weight (N, w) of any dtype."""
    return torch.cat(
        [x @ weight[rows].float().T for rows in row_chunks(*weight.shape, device=weight.device)], 1
    )


def output_error(part: FittedPart, x: torch.Tensor, y: torch.Tensor) -> float:
    """Energy of y (R, N) less what the part gives for tokens x (R, w), both fp32, without the bias."""
    spec, act, smooth = part.spec, part.spec.activation, part.smooth
    if act is None:
        tx = transform_activation(x, smooth, spec.rotation, factors=part.factors)
    else:
        codes, scale = quantize_activation(
            x,
            spec,
            smooth,
            part.factors,
            part.low_rank and part.low_rank[0],
        )
        tx = dequantize(codes, scale, act.granularity, act.group)
        if act.shift:
            # Quantized weights also multiply the shift, which the bias takes back.
            tx = tx - (act.shift / smooth if smooth is not None else act.shift)
    down, up = (None, None) if part.low_rank is None else part.low_rank
    low = None if down is None else x @ down.float()
    error = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in row_chunks(*part.codes.shape, device=part.codes.device):
        grain, group = spec.weight.granularity, spec.weight.group
        weight = dequantize(part.codes[rows], part.scales[rows].float(), grain, group)
        rest = torch.addmm(y[:, rows], tx, weight.T, alpha=-1)
        if low is not None and up is not None:
            rest.addmm_(low, up[rows].float().T, alpha=-1)
        error += rest.double().square().sum()
    return error.item()


def fit_parts(problem: Problem, fit_part) -> Fitted:
    """The layer of fit_part(part) -> (a FittedPart, {choice: value}) for
    each part of the problem."""
    parts: list[FittedPart] = []
    choices: dict = {}
    for i, part in enumerate(problem.layer.parts):
        fitted, chosen = fit_part(part)
        parts.append(fitted)
        choices |= chosen if len(problem.layer.parts) == 1 else {f"{i}.{k}": v for k, v in chosen.items()}
    return Fitted(assemble(problem, parts), choices)


def scale_tensors(scales: list[torch.Tensor], grid: str) -> dict[str, torch.Tensor]:
    """The tensors of a LinearSpec that hold the scales (N, G) of its parts: weight_scale, and beside it
    outer_scale on the nvfp4 grid."""
    if grid != NVFP4:
        return {"weight_scale": torch.cat([s.T for s in scales]).contiguous()}
    inner, outer = zip(*map(nvfp4.split, scales), strict=True)
    return {"weight_scale": torch.cat(inner, 1), "outer_scale": torch.stack(outer)}


def assemble(problem: Problem, parts: list[FittedPart], order: torch.Tensor | None = None) -> QuantizedLayer:
    """A layer from its parts, which are side by side. order (K,): the raw in-channel at each place, None as
    they are."""
    dtype = problem.dtype
    tensors = {"weight": torch.cat([p.spec.weight.pack(p.codes) for p in parts], 1)}
    tensors |= scale_tensors([p.scales for p in parts], parts[0].spec.weight.grid)
    if any(p.smooth is not None for p in parts):
        ones = [
            torch.ones(p.spec.width, device=problem.weight.device) if p.smooth is None else p.smooth
            for p in parts
        ]
        tensors["smooth_factor"] = torch.cat([o.to(dtype) for o in ones])
    if branches := [p.low_rank for p in parts if p.low_rank is not None]:
        tensors["proj_down"] = torch.cat([down for down, _ in branches]).to(dtype)
        tensors["proj_up"] = torch.cat([up for _, up in branches], 1).to(dtype)
    if learned := [f.to(dtype).flatten(1) for p in parts for f in p.factors or ()]:
        tensors["transform"] = torch.cat(
            [torch.cat(pair, 1).flatten() for pair in zip(learned[::2], learned[1::2], strict=True)]
        )
    bias = problem.bias
    for p in parts:
        if p.spec.activation is not None and p.spec.activation.shift:
            # In fp32: bf16 would round the correction to 1/256 of the bias.
            correction = shift_correction(p.codes, p.scales, p.spec, p.smooth)
            bias = -correction if bias is None else bias.float() - correction
    if bias is not None:
        tensors["bias"] = bias
    if order is not None:
        tensors["channel_order"] = order.int()
    specs = tuple(p.spec for p in parts)
    k = problem.layer.in_features - problem.padding
    spec = LinearSpec(
        k,
        problem.layer.out_features,
        specs,
        bias is not None,
        order is not None,
        problem.padding,
        problem.layer.spatial,
    )
    return QuantizedLayer(problem.layer.name, spec, {k: t.contiguous() for k, t in tensors.items()})
