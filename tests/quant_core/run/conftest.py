"""The small FLUX that training tests share."""

from comfyui_nibble.tests.assets.small_flux import one_thread, small  # noqa: F401
