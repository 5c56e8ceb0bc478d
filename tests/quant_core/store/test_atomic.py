import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from comfyui_nibble.quant_core.store import atomic
from comfyui_nibble.quant_core.store.atomic import (
    NoRoom,
    OverInput,
    is_temporary,
    leftovers,
    new_folder,
    replacing,
    require_folder,
    require_output,
    require_room,
    require_writable,
    save_tensors,
    save_text,
)

pytestmark = pytest.mark.quick


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


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "c").write_bytes(b"mine")
    with pytest.raises(NotADirectoryError, match=r"c: a file\. Name a folder to write into"):
        require_folder(tmp_path / "c")
    with pytest.raises(OSError, match="c/d: cannot be written"):
        require_folder(tmp_path / "c" / "d")
    (tmp_path / "e").mkdir()
    for name in ("e", "new"):
        require_folder(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "e"]


def test_a_folder_is_not_made_to_see_whether_it_can_be(tmp_path, monkeypatch):
    """Of two runs that ask at the same moment, the one that made it took it from the other."""
    seen = []
    monkeypatch.setattr(
        atomic, "TemporaryFile", lambda dir: seen.append((dir, (tmp_path / "new").exists())) or nullcontext()
    )
    require_folder(tmp_path / "new")
    assert seen == [(tmp_path, False)]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "models").write_bytes(b"")
    with pytest.raises(
        OSError, match=r"models/q.safetensors: cannot be written \(.*\)\. Choose another place"
    ):
        require_writable(tmp_path / "models" / "q.safetensors")


def test_a_device_or_a_pipe_is_no_file(tmp_path):
    """A rename would take away the machine's /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
        with pytest.raises(OSError, match=rf"{path}: a device, a pipe or a socket, .* Name a file to write"):
            require_writable(path)
        with pytest.raises(OSError, match="a device, a pipe or a socket"):
            save_text(path, "x")
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_protected_file_is_refused_before_the_work(tmp_path, monkeypatch):
    """Root may write everything, so it is asked as another user is."""
    path = tmp_path / "q.safetensors"
    path.write_bytes(b"mine")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda p, mode, **_: bool(Path(p).stat().st_mode & 0o200))
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    for write in (require_writable, lambda p: save_text(p, "x")):
        with pytest.raises(PermissionError, match=r"q.safetensors: is protected from writing\. Name another"):
            write(path)
    assert path.read_bytes() == b"mine"


# -- what is read is not written over


@pytest.mark.parametrize(
    "alias", ["itself", "symbolic link", "hard link", "link to its folder", "..", "link as input"]
)
def test_no_name_of_an_input_is_written(tmp_path, alias):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "m.safetensors"
    source.write_bytes(b"weights")
    out = {
        "itself": source,
        "symbolic link": tmp_path / "link",
        "hard link": tmp_path / "hard",
        "link to its folder": tmp_path / "folder" / "m.safetensors",
        "..": tmp_path / "in" / ".." / "in" / "m.safetensors",
        "link as input": source,
    }[alias]
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "folder").symlink_to(tmp_path / "in", target_is_directory=True)
    inputs = [tmp_path / "other", tmp_path / "link" if alias == "link as input" else source]
    with pytest.raises(
        OverInput,
        match=rf"^{re.escape(str(out))}: is read by this command \(.*\), and would be written over\. Name "
        r"another",
    ):
        require_output(out, inputs)
    require_output(tmp_path / "in" / "other.safetensors", inputs)
    assert source.read_bytes() == b"weights"


# -- room


def test_a_disk_that_is_too_small_is_named_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2_000_000, 2_000_000))
    path = tmp_path / "new" / "q.safetensors"
    with pytest.raises(
        NoRoom,
        match=r"q.safetensors: 3.0 MB are needed, 2.0 MB are free\. Make room, or choose another place",
    ):
        require_room(path, 3_000_000)
    require_room(path, 1_000_000)
    with pytest.raises(NoRoom, match="3.0 MB are needed"):
        require_output(path, [], 3_000_000)
    with pytest.raises(NoRoom, match="4.0 MB are needed"):
        save_tensors(path, {"a": torch.zeros(10**6)}, {})


@pytest.fixture
def limited():
    """A function that sets the largest size of files, for the length of a test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_files_is_named_before_the_work(tmp_path, limited):
    limited(100_000)
    with pytest.raises(
        NoRoom, match=r"q.safetensors: 0.4 MB are needed, files may have 0.1 MB here \(ulimit -f\)"
    ):
        save_tensors(tmp_path / "q.safetensors", {"a": torch.zeros(100_000)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [lambda p: save_tensors(p, {"a": torch.zeros(100_000)}, {}), lambda p: save_text(p, "x" * 400_000)],
)
def test_a_write_that_fails_halfway_is_named_and_keeps_what_was_there(tmp_path, limited, monkeypatch, write):
    """Another process may fill the disk after the check."""
    monkeypatch.setattr("comfyui_nibble.quant_core.store.atomic.require_room", lambda *args: None)
    path = tmp_path / "q.safetensors"
    path.write_bytes(b"old")
    limited(100_000)
    with pytest.raises(
        NoRoom,
        match=r"q.safetensors: files may not become that large; .*MB are free\. Make room.*what was there "
        r"before is kept",
    ):
        write(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# -- names and rights


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_have_the_rights_of_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "t", {"a": torch.zeros(4)}, {})
        save_text(tmp_path / "s", "x")
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == dict.fromkeys(
        "ts", 0o666 & ~umask
    )


def test_a_replaced_file_keeps_its_rights(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"")
    path.chmod(0o640)
    save_tensors(path, {"a": torch.zeros(4)}, {})
    assert path.stat().st_mode & 0o777 == 0o640


KILLED = """
    import os, signal, sys, torch
    from pathlib import Path
    from comfyui_nibble.quant_core.store import atomic
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    atomic.save_tensors(Path(sys.argv[1]), {"a": torch.zeros(1000)}, {})
"""


def test_what_a_killed_run_leaves_is_known_as_ours_and_removed_by_the_next(tmp_path):
    path = tmp_path / "model.safetensors"
    assert (
        subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(path)], check=False).returncode
        == -9
    )
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".model.safetensors.")
    assert left.name.endswith(".nibble-tmp")
    (tmp_path / ".other.nibble-tmp").mkdir()
    save_text(tmp_path / "another", "x")
    assert left.exists()  # of another file
    save_tensors(path, {"a": torch.zeros(1)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.nibble-tmp", "another", "model.safetensors"]


def test_a_file_under_way_in_another_run_is_left_alone(tmp_path):
    path = tmp_path / "q"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            assert len(leftovers(path)) == 2
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_whose_name_ends_as_ours_is_not_ours(tmp_path):
    for name in ("thesis.nibble-tmp", ".thesis.nibble-tmp", ".a.0123456.89abcdef.nibble-tmp"):
        (tmp_path / name).mkdir()
        assert not is_temporary(tmp_path / name)
    with replacing(tmp_path / "a\nb") as temporary:
        assert is_temporary(temporary.parent)
        (tmp_path / f"{temporary.parent.name[:-20]}00000000.nibble-tmp").symlink_to(tmp_path)
        assert leftovers(tmp_path / "a\nb") == [temporary.parent]


def test_names_as_long_as_a_file_system_takes(tmp_path):
    path = tmp_path / ("n" * 250)
    save_text(path, "x")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_whole_or_not_there(tmp_path):
    def stopped():
        with new_folder(tmp_path / "out") as part:
            (part / "a").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as part:
        (part / "a").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


def test_a_folder_is_made_where_a_link_leads_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with new_folder(tmp_path / "link") as part:
        (part / "a").write_text("whole")
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["a"]


def test_the_same_content_is_the_same_bytes(tmp_path):
    """safetensors alone writes the entries of a header in any order."""
    entries = {name: f"{name} ü \x1f" for name in "gfedcba"}
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    first = tmp_path / "0"
    for i in range(8):
        save_tensors(tmp_path / str(i), tensors, dict(entries))
        assert (tmp_path / str(i)).read_bytes() == first.read_bytes()
    found = load_file(first)
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    with safe_open(first, "pt") as file:
        assert {k: file.metadata()[k] for k in entries} == entries
