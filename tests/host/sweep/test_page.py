"""docs/models.md says what the code does."""

from comfyui_nibble.tests.host.sweep.page import PAGE, rows, text


def test_page_is_fresh(comfy):
    """Where it is not: `python -m comfyui_nibble.tests.host.sweep.page`."""
    assert rows(PAGE.read_text()) == rows(text())
