"""Sampling in which every linear layer is called, so that hooks see its input."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def linear_layers_called() -> Iterator[None]:
    """ComfyUI after 0.33 computes some linear layers itself under --fast fp16_accumulation, without a call.
    That option is PyTorch's own switch, which is off in here."""
    matmul = torch.backends.cuda.matmul
    was = getattr(matmul, "allow_fp16_accumulation", False)
    if was:
        matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        if was:
            matmul.allow_fp16_accumulation = True
