"""Memory that nobody has written holds what shows: NaN in floats, JUNK in integers.

`torch.empty` hands out what an earlier tensor has left, mostly zeros or good numbers, and code that reads it
passes by luck. Within `filled_with_junk` such code computes NaN. Compilers, meta and fake tensors see nothing
of it: only a plain dense tensor on the CPU is filled.
"""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._device import _device_constructors

JUNK = 0x55


def is_plain(tensor) -> bool:
    """Whether a tensor is an ordinary one with memory of its own on the CPU."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not torch.compiler.is_compiling()
    )


def fill(tensor: torch.Tensor):
    """NaN or JUNK into all of a plain tensor, in whatever mode of autograd."""
    raw = tensor.detach()
    if raw.dtype.is_floating_point and raw.dtype.itemsize == 1:  # fp8 and fp4: bytes of ones are NaN, or odd
        raw.view(torch.uint8).fill_(0xFF)
    elif raw.dtype.is_floating_point or raw.dtype.is_complex:
        raw.fill_(torch.nan)
    else:
        raw.fill_(True if raw.dtype == torch.bool else JUNK)


def _filled(make):
    @functools.wraps(make)
    def made(*args, **kwargs):
        out = make(*args, **kwargs)
        if is_plain(out) and kwargs.get("out") is None:
            fill(out)
        return out

    return made


@contextmanager
def filled_with_junk():
    """Within, what `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return is filled."""
    _device_constructors()  # torch remembers there, by identity, to which functions `with device` applies
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _filled(getattr(owner, name)))
        yield
