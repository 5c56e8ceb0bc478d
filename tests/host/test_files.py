"""Where Nibble Save Model puts its files."""

import pytest

from comfyui_nibble.tests.host.inside import packed_hash


@pytest.mark.parametrize("prefix", ["diffusion_models/q", "diffusion_models/", "", "q", "deep/er/", "%date:yyyy%/x"])
def test_no_earlier_file_is_written_over(comfy, base, outputs, prefix):
    from comfyui_nibble.nodes.files import NibbleSaveModel

    paths = [NibbleSaveModel.execute(base, prefix).args[0] for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(p.endswith(f"0000{i}_.safetensors") for i, p in enumerate(paths, 1))


def test_what_is_saved_is_what_is_loaded(comfy, base, outputs):
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import load

    assert packed_hash(load(NibbleSaveModel.execute(base, "x/").args[0])) == packed_hash(base)
