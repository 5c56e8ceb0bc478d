"""Two runs of one quantized network on equal codes.

Sums in another order, as another batch, compiler or processor has them, move an activation by a rounding. Where it lies on the edge of
two codes it becomes the other one, a whole step away, and a few layers on the two runs differ by as much as quantization costs: no
bound on their outputs follows from the rounding. So the codes of one run are kept and another run takes them. Then the outputs differ
by rounding alone (ROUNDING), and what remains to be asked of the codes is asked of each of them: that the other run's own value would
have become it, or lay on its edge (EDGE).
"""

from contextlib import contextmanager
from unittest import mock

import torch

from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.quant_core.quantizers import code_range, grouped

EDGE = 1e-3  # steps of a code
ROUNDING = 1e-5  # relative error of the outputs


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
    """A run that takes `codes` in the place of its own. edge: how far a value lay outside of what is rounded to the code it took, in
    steps, at most. changed: how many of the codes are not what the run itself would have had."""

    def __init__(self, codes: Codes):
        self.codes, self.at, self.edge, self.changed = codes, 0, 0.0, 0

    def __call__(self, steps, own, low, top):
        assert self.at < len(self.codes.calls), f"the quantizer is called more often than the {self.at} times of the run before"
        codes = self.codes.calls[self.at]
        assert codes.shape == own.shape, f"call {self.at} of the quantizer has the shape {tuple(own.shape)}, before {tuple(codes.shape)}"
        self.at += 1
        # At one bit -1 and 1 meet at 0 and nothing else is rounded.
        beyond = -steps * codes if (low, top) == (-1, 1) and bool((own != 0).all()) else (steps.clamp(low, top) - codes).abs() - 0.5
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


@contextmanager
def _through(quantizer, running):
    real = quantizer.quantize

    def quantize(x, scale, bits, granularity, group=64, unsigned=False):
        codes = real(x, scale, bits, granularity, group, unsigned)
        steps = (grouped(x, granularity, group) / scale.unsqueeze(-1)).reshape(x.shape)
        return _codes(steps, codes, *code_range(bits, unsigned))

    _running.append(running)
    try:
        with mock.patch.object(quantizer, "quantize", quantize):
            yield running
    finally:
        _running.pop()


def kept(quantizer=naive):
    """Within, a Codes is filled. quantizer: the module `kernels.quant_linear.naive` of the pack that runs, where there are two."""
    return _through(quantizer, Codes())


def taken(codes: Codes, quantizer=naive):
    """Within, codes are taken from another run; gives the Taken."""
    return _through(quantizer, Taken(codes))
