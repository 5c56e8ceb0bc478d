"""The models that training tests share."""

import pytest

from comfyui_nibble.tests.assets.small_flux import one_thread, small  # noqa: F401
from comfyui_nibble.tests.quant_core.training.world import World


@pytest.fixture
def world():
    return World()
