"""Where Nibble Save Model puts its files."""

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_nibble.tests.host.inside import packed_hash


@pytest.mark.parametrize(
    "prefix", ["diffusion_models/q", "diffusion_models/", "", "q", "deep/er/", "%date:yyyy%/x"]
)
def test_no_earlier_file_is_written_over(comfy, base, outputs, prefix):
    from comfyui_nibble.nodes.files import NibbleSaveModel

    paths = [NibbleSaveModel.execute(base, prefix).args[0] for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(p.endswith(f"0000{i}_.safetensors") for i, p in enumerate(paths, 1))


def test_what_is_saved_is_what_is_loaded(comfy, base, outputs):
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import load

    assert packed_hash(load(NibbleSaveModel.execute(base, "x/").args[0])) == packed_hash(base)


def damaged(path, change):
    """Changes the file's tensors in place, and keeps its hashes."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata)


def test_a_nan_among_the_scales_is_an_error_at_load(comfy, base, outputs):
    """It would be a black picture."""
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import load

    path = NibbleSaveModel.execute(base, "q").args[0]
    damaged(path, lambda state: state["single_blocks.0.linear2.weight_scale"].view(-1)[7].fill_(float("nan")))
    with pytest.raises(
        ValueError,
        match=r"q_00001_.safetensors: single_blocks.0.linear2.weight_scale: NaN or Inf\. The file is damaged",
    ):
        load(path)


def test_every_tensor_is_compared_with_its_hash_where_it_is_asked_for(comfy, base, outputs, monkeypatch):
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import load

    path = NibbleSaveModel.execute(base, "q").args[0]
    monkeypatch.setenv("NIBBLE_VERIFY", "1")
    assert packed_hash(load(path)) == packed_hash(base)
    damaged(path, lambda state: state["single_blocks.0.linear1.weight"].view(-1)[3].bitwise_xor_(1))
    with pytest.raises(
        ValueError,
        match=r"1 of \d+ tensors are not what was written: single_blocks.0.linear1.weight\. Download it",
    ):
        load(path)
    monkeypatch.setenv("NIBBLE_VERIFY", "0")
    assert packed_hash(load(path)) != packed_hash(base)
