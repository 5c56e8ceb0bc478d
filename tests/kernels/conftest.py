"""The kernels' tests run in Triton's interpreter (see tests/conftest.py)."""

import numpy
import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    )  # of the interpreter


@pytest.fixture(autouse=True, scope="session")
def _rounding_of_gpus():
    """The interpreter of Triton 3.6 rounds twice in an fma and truncates to bf16; GPUs round once, to
    nearest."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        exact = x.data.astype(numpy.float64) * y.data.astype(numpy.float64) + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def cast(self, src, dst_type):
        source, wanted = src.dtype.scalar, dst_type.scalar
        if (source, wanted) == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(numpy.array(src.data)).bfloat16().view(torch.uint16).numpy()
        elif (source, wanted) == (tl.bfloat16, tl.float32):
            data = (src.data.astype(numpy.uint32) << 16).view(numpy.float32)
        else:
            return other_casts(self, src, dst_type)
        return TensorHandle(data, wanted)

    other_casts = InterpreterBuilder.cast_impl
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", fma)
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        yield
