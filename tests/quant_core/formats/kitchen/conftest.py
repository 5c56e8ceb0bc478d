"""A small FLUX, written with one layer in a format of comfy-kitchen's."""

import pytest
from comfy_kitchen.tensor import QuantizedTensor

from comfyui_nibble.tests.assets.kitchen import SHAPES, weight, written
from comfyui_nibble.tests.assets.synthetic import random_state


@pytest.fixture(scope="module")
def state():
    return random_state(SHAPES)


@pytest.fixture
def write(tmp_path, state):
    return lambda *args, **kwargs: written(tmp_path / "model.safetensors", state, *args, **kwargs)


@pytest.fixture(scope="module")
def int8():
    return QuantizedTensor.from_float(weight(), "TensorWiseINT8Layout", per_channel=True).state_dict("weight")
