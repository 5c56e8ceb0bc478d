"""Two runs of one quantized network on equal codes.

Sums in another order, as another batch, compiler or processor has them, move an activation by a rounding.
Where it lies on the edge of two codes it becomes the other one, a whole step away, and a few layers on the
two runs differ by as much as quantization costs: no bound on their outputs follows from the rounding. So the
codes of one run are kept and another run takes them. Then the outputs differ by rounding alone (ROUNDING),
and what remains to be asked of the codes is asked of each of them: that the other run's own value would have
become it, or lay on its edge (EDGE).
"""

import importlib
import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch

from comfyui_nibble.kernels.operator import quantizers
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.quantizers import code_range, dequantize, grouped
from comfyui_nibble.tests.support import relative_error

EDGE = 1e-4  # steps of a code; the roundings of fp32 in these networks make up to 1e-5
ROUNDING = 1e-5  # relative error of the outputs; 5e-7


class Codes:
    """Activation codes of a run in the order of its calls of the quantizer, each (rows, K)."""

    def __init__(self, calls=()):
        self.calls = list(calls)

    def __call__(self, steps, codes, low, top):
        self.calls.append(codes.clone())
        return codes.clone()

    def __len__(self):
        return sum(c.numel() for c in self.calls)


class Taken:
    """A run that takes `codes` in the place of its own. edge: how far a value lay outside of what is rounded
    to the code it took, in steps, at most. changed: how many of the codes are not what the run itself would
    have had."""

    def __init__(self, codes: Codes):
        self.codes, self.at, self.edge, self.changed = codes, 0, 0.0, 0

    def __call__(self, steps, own, low, top):
        assert self.at < len(self.codes.calls), (
            f"the quantizer is called more often than the {self.at} times of the run before"
        )
        codes = self.codes.calls[self.at]
        assert codes.shape == own.shape, (
            f"call {self.at} of the quantizer has the shape {tuple(own.shape)}, before {tuple(codes.shape)}"
        )
        self.at += 1
        # At one bit -1 and 1 meet at 0 and nothing else is rounded.
        beyond = (
            -steps * codes
            if (low, top) == (-1, 1) and bool((own != 0).all())
            else (steps.clamp(low, top) - codes).abs() - 0.5
        )
        self.edge = max(self.edge, float(beyond.nan_to_num(torch.inf).max())) if codes.numel() else self.edge
        self.changed += int((own.int() != codes.int()).sum())
        return codes.to(own.dtype)


_running = []  # the Codes or Taken of the innermost context


@torch.library.custom_op("comfyui_nibble_tests::codes", mutates_args=())
def _codes(steps: torch.Tensor, codes: torch.Tensor, low: int, top: int) -> torch.Tensor:
    return _running[-1](steps, codes, low, top)


@_codes.register_fake
def _(steps, codes, low, top):
    return torch.empty_like(codes)


@cache
def _through(real):
    """The quantizer with the operator behind it: one function for all contexts, on which torch.compile
    guards."""

    def quantize(x, scale, bits, granularity, group=64, unsigned=False):
        codes = real(x, scale, bits, granularity, group, unsigned)
        steps = (grouped(x, granularity, group) / scale.unsqueeze(-1)).reshape(x.shape)
        return _codes(steps, codes, *code_range(bits, unsigned))

    return quantize


def _int8_of(quantizer):
    """The module `kernels.quant_linear.torch_int8` of the same pack."""
    pack = quantizer.__name__.removesuffix(".operator.quantizers")
    return importlib.import_module(f"{pack}.quant_linear.torch_int8")


@contextmanager
def _running_as(running, quantizer):
    _running.append(running)
    try:
        # All rows at once: a call of the quantizer is one of the layer's.
        whole = mock.patch.object(_int8_of(quantizer), "ROWS", 2**30)
        with whole, mock.patch.object(quantizer, "quantize", _through(quantizer.quantize)):
            yield running
    finally:
        _running.pop()


def kept(quantizer=quantizers):
    """Within, a Codes is filled. quantizer: the module `kernels.operator.quantizers` of the pack that runs,
    where there are two."""
    return _running_as(Codes(), quantizer)


def taken(codes: Codes, quantizer=quantizers):
    """Within, codes are taken from another run; gives the Taken."""
    return _running_as(Taken(codes), quantizer)


def record(run: Callable[..., torch.Tensor], *args):
    """(what run(*args) returns, its codes), for `assert_repeats`."""
    with kept() as codes:
        return run(*args), codes


def assert_repeats(recorded, run: Callable[..., torch.Tensor], *args):
    """run(*args) is the recorded run with sums in another order: the same output on its codes, and those
    codes of its own values."""
    want, codes = recorded
    with taken(codes) as took:
        got = run(*args)
    assert took.at == len(codes.calls) > 0, (
        f"{took.at} calls of the quantizer, {len(codes.calls)} in the run before"
    )
    assert took.edge < EDGE, f"a value lies {took.edge:.2g} steps beyond what is rounded to its code"
    error = relative_error(want, got)
    assert error < ROUNDING, f"outputs on equal codes differ by {error:.2g}"


class _Near:
    """Keeps which values lie on the edge of two codes."""

    def __call__(self, steps, codes, low, top):
        halves = (
            steps
            if (low, top) == (-1, 1) and bool((codes != 0).all())
            else (steps.clamp(low, top) - codes).abs() - 0.5
        )
        self.values = halves.abs() < EDGE
        return codes.clone()


def layer_error(want, got, x, spec, tensors) -> float:
    """Relative error of a layer's output on the same x (M, K) where the other side's codes cannot be had: of
    each output as much is left out as the codes on an edge can move it, a step of each activation times its
    weight. Few are on one, mostly none."""
    if spec.order:
        x = x.index_select(1, tensors["channel_order"])
    left_out = torch.zeros(x.shape[0], spec.out_features)
    for (part, packed, scales, smooth), factors in zip(
        spec.split(tensors), spec.factors(tensors), strict=True
    ):
        act = part.activation
        if act is None:
            continue
        with _running_as(_Near(), quantizers) as near:
            _, scale = quantizers.quantize_activation(
                x[:, part.start : part.stop], part, None if smooth is None else smooth.float(), factors
            )
        steps = dequantize(
            near.values.to(torch.int8) * (2 if act.bits == 1 else 1), scale, act.granularity, act.group
        )
        grain = "group" if part.scale_rows > 1 else "channel"
        left_out += (
            steps
            @ dequantize(unpack(packed, part.weight.bits), scales.float().T, grain, part.weight.group).abs().T
        )
    want, got = want.double(), got.double()
    return float(((want - got).abs() - left_out).clamp(min=0).norm() / want.norm().clamp(min=1e-30))


def assert_apart_by_flips(full, a, b):
    """a and b are one quantized network, run by two programs whose codes cannot be made equal. Flipped codes
    part them until their errors against `full` precision have nothing in common, and no further; and they
    leave the size of the error what it is, to within the fourth part by which it varies from run to run."""
    errors, apart = (relative_error(full, a), relative_error(full, b)), relative_error(full, full + a - b)
    assert apart < math.hypot(*errors), f"{apart:.2g} apart, at errors of {errors[0]:.2g} and {errors[1]:.2g}"
    assert max(errors) < 1.25 * min(errors), f"errors of {errors[0]:.2g} and {errors[1]:.2g}"
