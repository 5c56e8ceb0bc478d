"""Files that are whole or not there: written in a folder of ours beside their place, then renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from . import digests, lock
from .lock import acquired, released

TEMPORARY = ".nibble-tmp"  # what the folder of a file under way ends with
_TEMPORARY = re.compile(rf"\..+\.[0-9a-f]{{8}}\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}", re.DOTALL)
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "files may not become that large",
}
_own: set[Path] = set()  # of this process


class NoRoom(OSError):
    """A disk, a quota or a limit on the size of files is too small for what is written. errno: which."""

    def __init__(self, code: int | None, text: str):
        super().__init__(text)
        self.errno = code


class OverInput(ValueError):
    """What is to be written would take the place of what is read."""


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str]):
    """safetensors' save_file under a temporary name in the same folder, flushed to disk, then renamed; with
    hashes of what it holds in its header, see `digests`. tensors: contiguous, on the CPU. Raises NoRoom."""
    metadata = metadata | digests.entry(tensors, metadata)
    size = sum(t.nbytes for t in tensors.values()) + sum(map(len, metadata.values()))
    require_room(path, size)
    with replacing(path, size) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        _in_order(temporary)


def _in_order(path: Path):
    """Puts the header's entries in the order of their names: safetensors writes them in any, and the same
    content is to be the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # as long as before, unless safetensors escapes otherwise
            file.seek(8)
            file.write(text.ljust(size))


def save_text(path: Path, text: str):
    """The same for text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_output(path: Path, inputs: Iterable[Path], needed: int = 0):
    """What a command checks of a file that it is to write, before its work: `require_writable`, and that it
    is none of `inputs`, under whatever name: links are followed. Raises OverInput."""
    path = Path(path)
    for source in map(Path, inputs):
        same = path.resolve() == source.resolve()
        with suppress(OSError):  # hard links; one of them may not be there
            same = same or path.samefile(source)
        if same:
            raise OverInput(
                f"{path}: is read by this command ({source}), and would be written over. Name another file "
                "to write."
            )
    require_writable(path, needed)


def require_writable(path: Path, needed: int = 0):
    """Raises OSError naming `path` where no file of `needed` bytes can be put; to be called before the work
    whose result goes there."""
    path = Path(path)
    _require_replaceable(path)
    _require_takes_files(path, path.parent)
    require_room(path, needed)


def _require_takes_files(path, folder):
    """Raises OSError naming `path` where no file can be put into `folder`, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error}). Choose another place.") from error


def _require_replaceable(path):
    """Raises OSError where a rename to `path` would fail, or would take away what is no file: a device, a
    pipe, a file that its owner has protected."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder. Name the file to write.")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: a device, a pipe or a socket, which would be replaced. Name a file to write.")
    if path.exists() and not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(
            f"{path}: is protected from writing. Name another file, or allow writing to it."
        )


def require_folder(path: Path):
    """The same of a folder: raises OSError where `path` is a file, or no file can be put into it."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: a file. Name a folder to write into.")
    # One that is not there is not made to see whether it can be: another run that asks at the same moment
    # would lose it under its hands.
    _require_takes_files(path, path if path.is_dir() else path.parent)


def require_room(path: Path, needed: int):
    """Raises NoRoom where the disk of `path` has less than `needed` bytes free, or files may not be that
    large."""
    limit = _largest_file()
    if limit is not None and limit < needed:
        raise NoRoom(
            errno.EFBIG,
            f"{path}: {_mb(needed)} are needed, files may have {_mb(limit)} here (ulimit -f). Raise the "
            "limit.",
        )
    require_free(path, needed)


def require_free(path: Path, needed: int):
    """Raises NoRoom where the disk of `path` has less than `needed` bytes free, for any number of files."""
    there = next(p for p in Path(path).absolute().parents if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise NoRoom(
            errno.ENOSPC,
            f"{path}: {_mb(needed)} are needed, {_mb(free)} are free. Make room, or choose another place.",
        )


def _largest_file() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _mb(size) -> str:
    return f"{size / 1e6:,.1f} MB"


@contextmanager
def replacing(path: Path, size: int = 0):
    """Gives a temporary path, whose file takes the place of `path` if the block ends well, with the rights
    that the former file or any new one has. What killed runs have left of the same file is removed. size: in
    bytes, where it is known. Raises NoRoom."""
    path = Path(path)
    _require_replaceable(path)
    with _under_way(path) as folder:
        temporary = folder / "file"
        try:
            temporary.touch()
            # Safetensors 0.8 makes files of 0600.
            mode = (path if path.exists() else temporary).stat().st_mode
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            temporary.chmod(mode & 0o7777)
            os.replace(temporary, path)
            _flush(path.parent)
        except (OSError, SafetensorError) as error:
            raise _named(path, error, size) from error


@contextmanager
def scratch_folder(path: Path):
    """Gives a folder for files that live as long as the block, beside `path` and with its name: marked as
    ours, so that what a killed run leaves is found by the next one and by `nibble clean`."""
    with _under_way(Path(path)) as folder:
        temporary = folder / "folder"
        temporary.mkdir()
        yield temporary


@contextmanager
def new_folder(path: Path):
    """The same for a folder of files, where none or an empty one is at `path`, or where that leads to."""
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    with _under_way(path) as folder:
        temporary = folder / "folder"
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
        _flush(path.parent)


@contextmanager
def _under_way(path):
    """Gives a folder of ours beside `path`, once those that killed runs have left for it are gone, and
    removes it in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(path):
        remove_temporary(left)
    folder, held = _folder_for(path)
    try:
        yield folder
    finally:
        released(folder / "lock", held)
        _emptied(folder)


def _folder_for(path):
    """(a new folder for a file under way to `path`, its lock)."""
    while True:
        folder = path.with_name(f"{_prefix(path)}.{uuid4().hex[:8]}{TEMPORARY}")
        _own.add(folder)
        folder.mkdir(mode=0o700)
        with suppress(Timeout, FileNotFoundError):  # another run has just taken it for a leftover
            return folder, acquired(folder / "lock")


def _named(path, error, size):
    """`error`, or NoRoom where that is what it says; safetensors gives the system's number in its text
    alone."""
    code = getattr(error, "errno", None) or next(
        iter(map(int, re.findall(r"os error (\d+)", str(error)))), None
    )
    if isinstance(error, NoRoom) or code not in _FULL:
        return (
            error
            if isinstance(error, OSError)
            else OSError(f"{path}: cannot be written ({error}). Choose another place.")
        )
    needed = f"{_mb(size)} are needed, " * bool(size)
    free = shutil.disk_usage(path.parent).free
    return NoRoom(
        code,
        f"{path}: {_FULL[code]}; {needed}{_mb(free)} are free. Make room, or choose another place; what "
        "was there before is kept.",
    )


def _flush(folder):
    """The new name, too, is on the disk. Windows opens no folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _prefix(path) -> str:
    return f".{path.name[:60]}.{hashlib.sha256(path.name.encode()).hexdigest()[:8]}"


def leftovers(path: Path) -> list[Path]:
    """Folders of files under way to `path`, of this run or another, alive or killed."""
    start = f"{_prefix(path)}."
    return [p for p in path.parent.iterdir() if p.name.startswith(start) and is_temporary(p)]


def is_temporary(folder: Path) -> bool:
    """Whether a folder has the name of a file under way: hashes and all, so that no other folder whose name
    merely ends so is taken for one."""
    return _TEMPORARY.fullmatch(folder.name) is not None and folder.is_dir() and not folder.is_symlink()


def remove_temporary(folder: Path) -> bool:
    """Removes the folder of a file under way, unless its run is alive."""
    try:
        released(folder / "lock", acquired(folder / "lock"))
    except (Timeout, OSError):
        return False
    return _emptied(folder)


def clean_own():
    """Removes the folders of files that this process has under way, and its locks: where a signal ends it, it
    may be at any line."""
    for folder in list(_own):
        _emptied(folder)
    lock.clean_own()


def _emptied(folder) -> bool:
    with suppress(OSError):
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    if gone := not folder.exists():
        _own.discard(folder)
    return gone


def file_name(unit: str) -> str:
    """A file's name for a unit, which may be named by a checkpoint: nothing of that becomes a path."""
    return hashlib.sha256(unit.encode()).hexdigest()[:20]
