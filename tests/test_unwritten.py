"""In the tests, what is read without having been written shows."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from comfyui_nibble.tests.unwritten import JUNK

pytestmark = pytest.mark.quick

MAKERS = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 5, dtype=dtype)),
    "new_empty": lambda dtype: torch.zeros(2, dtype=dtype).new_empty((3, 5)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64],
)
def test_floats_are_nan(make, dtype):
    values = make(dtype)
    assert values.shape == (3, 5)
    assert (values if dtype.is_complex else values.float()).isnan().all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_are_junk(make, dtype):
    assert (make(dtype) == JUNK).all()


def test_parameters_and_inference():
    assert torch.empty(4, requires_grad=True).isnan().all()
    with torch.inference_mode():
        assert torch.empty(4).isnan().all()


def test_meta_and_fake_tensors_are_left_alone():
    with torch.device("meta"):
        assert torch.empty(4).is_meta
        assert torch.nn.Linear(4, 4).weight.is_meta
    assert torch.empty_like(torch.zeros(4, device="meta")).is_meta
    with FakeTensorMode():
        assert type(torch.empty(4)).__name__ == type(torch.zeros(4).new_empty(2)).__name__ == "FakeTensor"


def test_what_is_compiled_is_left_alone():
    def double(x):
        out = torch.empty_like(x)
        out.copy_(x)
        return out + out.new_empty(3).zero_() + torch.empty(3).fill_(1)

    x = torch.arange(3.0)
    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), x + 1)
