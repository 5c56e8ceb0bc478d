"""A quantized layer that can be trained: the operator in differentiable pieces, started from any method's
fit.

Rounding passes the gradient straight through (LSQ, arXiv 1902.08153: with the clamp around it, a scale gets q
- x/s inside the range and the largest code outside). Orthogonal factors move by a Cayley transform, so that
  no inverse is needed (FlatQuant, section 3).
"""

from dataclasses import replace
from typing import cast

import torch

from ...kernels.operator.codes import INT
from ...kernels.operator.packing import unpack
from ...kernels.operator.quantizers import TINY, code_range, grouped
from ...kernels.operator.spec import SpecError
from ...kernels.operator.transforms import fold_weight, kronecker, transform_activation
from ..layer.assemble import FittedPart, assemble
from ..layer.linear import QuantizedLayer
from ..layer.problem import Problem

# What can be trained, and its rate in units of the run's: ranges at 10 times the rate of transforms
# (FlatQuant).
KINDS = {
    "transform": 1.0,
    "smooth": 1.0,
    "clip": 10.0,
    "scale": 1.0,
    "threshold": 1.0,
    "low_rank": 0.1,
    "rounding": 2.0,
    "bias": 0.2,
}
EDGE = 0.49  # from a code, in steps: just inside of its cell
CLIP_START = 0.982  # sigmoid(4), FlatQuant's: a range of all of absmax would get no gradient


def round_through(x: torch.Tensor) -> torch.Tensor:
    """x rounded half to even; the gradient is that of x."""
    return x + (x.round() - x).detach()


def cayley(a: torch.Tensor) -> torch.Tensor:
    """The orthogonal (I - S)(I + S)^-1 of the skew part S = A - A^T of A (..., n, n)."""
    skew, eye = a - a.mT, torch.eye(a.shape[-1], device=a.device)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


class Factor(torch.nn.Module):
    """One Kronecker factor (pairs, n, n): start @ Cayley, or with `affine` start @ Cayley diag(exp d)
    Cayley'."""

    start: torch.Tensor
    back: torch.Tensor

    def __init__(self, start: torch.Tensor, affine: bool):
        super().__init__()
        start = start.float()
        self.register_buffer("start", start.clone())
        self.register_buffer("back", torch.linalg.inv(start.double()).mT.float())
        self.u = torch.nn.Parameter(torch.zeros_like(start))
        self.v = torch.nn.Parameter(torch.zeros_like(start)) if affine else None
        self.d = torch.nn.Parameter(start.new_zeros(start.shape[:-1])) if affine else None

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, P^-T)."""
        u = cayley(self.u)
        if self.v is None or self.d is None:
            return self.start @ u, self.back @ u
        v, d = cayley(self.v), self.d.exp()
        return self.start @ (u * d[..., None, :]) @ v, self.back @ (u / d[..., None, :]) @ v


class Student(torch.nn.Module):
    """A layer in training. forward(x (..., K)) -> (..., N) in the dtype of x; `layer()` packs what has been
    learned.

    problem: weight, bias and dtype. start: the layer as a method fitted it. kinds: names of KINDS to train;
    what a part does not have is left out. affine: factors may scale, not only rotate.
    """

    def __init__(self, problem: Problem, start: QuantizedLayer, kinds, affine: bool = False):
        super().__init__()
        if problem.weight.is_inference():  # as ComfyUI loads models; autograd refuses to keep those
            problem = replace(problem, weight=problem.weight.clone())
        self.order = start.tensors.get("channel_order")
        if self.order is not None:  # everything inside is in the order of the parts
            problem = replace(problem, weight=problem.weight.index_select(1, self.order))
        self.problem, self.kinds = problem, frozenset(kinds)
        if any(p.principal for p in start.spec.parts):
            raise SpecError(
                f"layer {start.name}: layers with principal components are not trained; set principal to ()"
            )
        if start.spec.grid != INT:
            raise SpecError(
                f"layer {start.name}: layers on the {start.spec.grid} grid are not trained; set training to "
                "none, or take integer codes"
            )
        tensors, rank = start.tensors, start.spec.rank
        parts = zip(start.spec.split(tensors), start.spec.factors(tensors), strict=True)
        self.parts = torch.nn.ModuleList()
        for i, ((spec, packed, scales, smooth), factors) in enumerate(parts):
            low_rank = None
            if rank:
                low_rank = (
                    tensors["proj_down"][spec.start : spec.stop],
                    tensors["proj_up"][:, i * rank : (i + 1) * rank],
                )
            made = _Part(
                problem,
                spec,
                unpack(packed, spec.weight.bits),
                scales.T,
                smooth,
                factors,
                low_rank,
                self.kinds,
                affine,
            )
            self.parts.append(made)
        bias = problem.bias
        if bias is None and "bias" in self.kinds:
            bias = problem.weight.new_zeros(len(problem.weight))
        self.bias = (
            None
            if bias is None
            else torch.nn.Parameter(bias.float().clone(), requires_grad="bias" in self.kinds)
        )

    def renew(self):
        """After a step of the optimizer: forget what is computed once of the parameters for all calls of a
        step."""
        for part in self.parts:
            part.made = None

    def forward(self, x: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """`rows`: out-channels to compute, for models that keep parts of a fused layer apart."""
        x = torch.nn.functional.pad(x, (0, self.problem.padding))
        if self.order is not None:
            x = x.index_select(-1, self.order)
        y = sum(part(x.float(), rows) for part in self.parts)
        return (y if self.bias is None else y + self.bias[rows]).to(x.dtype)

    def groups(self, rate: float) -> list[dict]:
        """Parameter groups of an optimizer, each kind at its own rate."""
        found: dict[str, list[torch.nn.Parameter]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                found.setdefault(_kind(name), []).append(p)
        return [{"params": ps, "lr": rate * KINDS[kind]} for kind, ps in found.items()]

    @torch.no_grad()
    def layer(self) -> QuantizedLayer:
        """The layer as it will be stored; the codes are rounded against what is stored of scales, smoothing
        and factors."""
        problem = replace(
            self.problem,
            bias=None if self.bias is None else self.bias.detach().to(self._bias_dtype(), copy=True),
        )
        return assemble(problem, [cast(_Part, part).stored() for part in self.parts], self.order)

    def _bias_dtype(self):
        return torch.float32 if self.problem.bias is None or "bias" in self.kinds else self.problem.bias.dtype


def _kind(name: str) -> str:
    leaf = name.split(".")
    return (
        "transform" if "factors" in leaf else {"down": "low_rank", "up": "low_rank"}.get(leaf[-1], leaf[-1])
    )


class _Part(torch.nn.Module):
    def __init__(self, problem, spec, codes, scales, smooth, factors, low_rank, kinds, affine):
        super().__init__()
        self.made = None
        self.spec, self.dtype, self.weight = spec, problem.dtype, problem.weight[:, spec.start : spec.stop]
        train = lambda kind, value: torch.nn.Parameter(value.float().clone(), requires_grad=kind in kinds)
        self.smooth = None if smooth is None else train("smooth", smooth.float().log())
        self.factors = None
        if factors is not None:
            self.factors = torch.nn.ModuleList(Factor(f, affine) for f in factors).requires_grad_(
                "transform" in kinds
            )
        self.down = self.up = self.base = None
        if low_rank is not None:
            self.down, self.up = (train("low_rank", t) for t in low_rank)
            # The weight that is rounded stays what the fit left of W; what training adds to the branch
            # corrects its rounding.
            self.base = tuple(t.float().clone() for t in low_rank)
        self.moving = ("smooth" in kinds and smooth is not None) or (
            "transform" in kinds and factors is not None
        )
        self.clip = None
        if spec.activation is not None and "clip" in kinds:
            self.clip = train(
                "clip", torch.logit(torch.tensor(min(spec.activation.clip, CLIP_START), device=codes.device))
            )
        with torch.no_grad():
            self.fixed, self.scale, self.threshold, self.rounding, value = (
                None,
                None,
                None,
                None,
                self._folded(),
            )
            if not self.moving:
                self.fixed = value
            self.scale_dtype, scales = scales.dtype, scales.float()
            absmax = self._absmax(value)
            # Where the transform moves, so does the range: the scale is then a share of absmax.
            self.scale = train("scale", (scales / absmax if self.moving else scales).log())
            if spec.weight.bits == 2:
                self.threshold = train("threshold", torch.zeros_like(scales))
            if not self.moving:
                # The point of the code's cell that is nearest to the weight, so that GPTQ's codes are where
                # training starts.
                real = grouped(value, self._grain, spec.weight.group) / scales[..., None]
                offset = (
                    torch.maximum(torch.minimum(real, self._codes(codes) + EDGE), self._codes(codes) - EDGE)
                    - real
                )
                self.rounding = train("rounding", offset.reshape(value.shape))

    @property
    def _grain(self):
        return "group" if self.spec.weight.granularity == "group" else "channel"

    def _codes(self, codes):
        return grouped(codes.float(), self._grain, self.spec.weight.group)

    def _absmax(self, value):
        return grouped(value, self._grain, self.spec.weight.group).abs().amax(-1).clamp(min=TINY)

    def _folded(self, smooth=None, factors=None):
        """What is rounded, (N, w) fp32; smoothing and factors as they stand in training, or as stored."""
        weight = self.weight.float()
        if self.base is not None:
            weight = weight - self.base[1] @ self.base[0].T
        if smooth is not None or factors is not None:
            return fold_weight(weight, smooth, self.spec.rotation, factors)
        smooth = None if self.smooth is None else self.smooth.exp()
        if self.factors is None:
            return fold_weight(weight, smooth, self.spec.rotation)
        return kronecker(weight if smooth is None else weight * smooth, *(f.both()[1] for f in self.factors))

    def _scales(self, value):
        scale = self.scale.exp()
        return scale * self._absmax(value) if self.moving else scale

    def _cells(self, value, scale):
        """Weights in units of the distance between two codes, before they are rounded."""
        step = scale if self.threshold is None else scale * self.threshold.exp()
        real = grouped(value, self._grain, self.spec.weight.group) / step[..., None]
        return (
            real
            if self.rounding is None
            else real + grouped(self.rounding, self._grain, self.spec.weight.group)
        )

    def _rounded(self):
        value = self._folded() if self.fixed is None else self.fixed
        scale = self._scales(value)
        low, top = code_range(self.spec.weight.bits)
        return (round_through(self._cells(value, scale).clamp(low, top)) * scale[..., None]).reshape(
            value.shape
        )

    def _activation(self, x, smooth, factors):
        a = self.spec.activation
        tx = transform_activation(x, smooth, self.spec.rotation, a.shift, factors)
        flat = grouped(tx.flatten(0, -2), a.granularity, a.group)
        low, top = code_range(a.bits, a.unsigned)
        clip = a.clip if self.clip is None else self.clip.sigmoid()
        scale = flat.abs().amax(-1, keepdim=True).clamp(min=TINY) * clip / top
        cells = (flat / scale).clamp(low, top)
        codes = torch.where(cells >= 0, 1.0, -1.0) if a.bits == 1 else cells.round()
        return ((cells + (codes - cells).detach()) * scale).reshape(tx.shape)

    def _once(self):
        """(smoothing, factors, rounded weight (N, w), what a shift adds to the output or None), all of a
        step."""
        if self.made is None or self.made[2].requires_grad != torch.is_grad_enabled():
            smooth = None if self.smooth is None else self.smooth.exp()
            factors = None if self.factors is None else tuple(f.both()[0] for f in self.factors)
            weight, added = self._rounded(), None
            if self.spec.activation is not None and self.spec.activation.shift:
                shift = torch.full((weight.shape[1],), self.spec.activation.shift, device=weight.device)
                added = weight @ (shift if smooth is None else shift / smooth)
            self.made = smooth, factors, weight, added
        return self.made

    def forward(self, x, rows):
        smooth, factors, weight, added = self._once()
        x = x[..., self.spec.start : self.spec.stop]
        tx = (
            transform_activation(x, smooth, self.spec.rotation)
            if self.spec.activation is None
            else self._activation(x, smooth, factors)
        )
        y = tx @ weight[rows].T
        if added is not None:
            y = y - added[rows]
        return y if self.down is None else y + (x @ self.down) @ self.up[rows].T

    def stored(self):
        """A part as `assemble` takes it."""
        smooth = None if self.smooth is None else self._normal(self.smooth).to(self.dtype).float()
        factors = (
            None if self.factors is None else tuple(f.both()[0].to(self.dtype).float() for f in self.factors)
        )
        value = self._folded(smooth, factors) if self.moving else self.fixed
        scale = self._scales(value).to(self.scale_dtype).clamp(min=torch.finfo(self.scale_dtype).tiny)
        low, top = code_range(self.spec.weight.bits)
        codes = self._cells(value, scale.float()).round().clamp(low, top).reshape(value.shape).to(torch.int8)
        spec = self.spec
        if self.clip is not None:
            spec = replace(
                spec, activation=replace(spec.activation, clip=round(float(self.clip.sigmoid()), 4))
            )
        low_rank = None if self.down is None else (self.down.to(self.dtype), self.up.to(self.dtype))
        return FittedPart(spec, codes, scale, smooth, low_rank, factors)

    def _normal(self, log):
        """A common factor of the smoothing would do nothing but leave the range of fp16."""
        return (log - log.mean()).exp() if self.moving else log.exp()
