"""Every diffusion model that ComfyUI has, small and random, through the pack's own nodes. A class may fail
for a reason of its own: the table of results is printed, one line a class, with `-rP`."""

import pytest

from comfyui_nibble.tests.host.sweep.registry import ENTRIES, WITHOUT


def test_every_class_of_comfyui_has_an_entry_or_a_reason(comfy):
    import comfy.supported_models

    classes = {c.__name__ for c in comfy.supported_models.models}
    named = {e.name for e in ENTRIES}
    assert named | set(WITHOUT) == classes, "a class is new or gone: give it an entry, or a reason in WITHOUT"
    assert not named & set(WITHOUT)
    assert len({e.id for e in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
def test_class(comfy, one_thread, outputs, entry):
    from comfyui_nibble.tests.host.sweep.flow import sweep

    result = sweep(entry)
    print(f"| {entry.id} | {result} |")
    assert result.layers
    assert 1e-3 < result.error < entry.error
    assert result.effect < 1e-3 or result.cosine >= entry.cosine
