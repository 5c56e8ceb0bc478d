"""The smallest Triton kernel: whether anything compiles and runs on this machine."""

import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr):
    offsets = tl.arange(0, 16)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)
