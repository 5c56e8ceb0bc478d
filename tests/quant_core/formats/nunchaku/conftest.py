"""A small FLUX in nunchaku's format."""

import pytest

from comfyui_nibble.tests.assets import nunchaku as made


@pytest.fixture(scope="module")
def model():
    return made.flux()
