import pytest

from comfyui_nibble.quant_core.formats.atomic import require_writable


def test_a_place_that_takes_a_file_is_left_as_it_was(tmp_path):
    there, new = tmp_path / "there.safetensors", tmp_path / "new" / "folder" / "q.safetensors"
    there.write_bytes(b"old")
    require_writable(there)
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_bytes() == b"old"
    require_writable(new)
    assert list(new.parent.iterdir()) == []


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "q.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"q.safetensors: a folder\. Name the file to write"):
        require_writable(tmp_path / "q.safetensors")


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "models").write_bytes(b"")
    with pytest.raises(OSError, match=r"models/q.safetensors: cannot be written \(.*\)\. Choose another place"):
        require_writable(tmp_path / "models" / "q.safetensors")
