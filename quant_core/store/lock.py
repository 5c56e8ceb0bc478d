"""One run at a time on what is written: an advisory lock beside it, which the system drops with its process.

On network drives without locks (NFS without lockd, some FUSE mounts) filelock has none to give: two runs
there are not kept apart.
"""

import json
import os
import socket
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ...kernels.operator.errors import plain, shortened

# The lock, and who has it: the lock's own bytes cannot be read on Windows.
LOCK, RUN = (
    ".nibble-lock",
    ".nibble-run",
)
_own: set[Path] = set()  # of this process


class Busy(OSError):
    """Another run is writing the same."""


@contextmanager
def only_run(target: Path, doing: str):
    """Keeps other runs off `target`, a file or a folder, within the block; its folder is made. doing:
    "quantizes model.safetensors".

    Raises Busy naming the process, its host, since when and what it does. Nothing of the lock is left behind.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Names have 255 bytes.
    lock, run = (target.with_name(f".{target.name[:200]}{suffix}") for suffix in (LOCK, RUN))
    try:
        held = acquired(lock)
    except Timeout:
        raise Busy(_who(target, run)) from None
    _own.update((run, lock))
    try:
        run.write_text(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": f"{datetime.now():%Y-%m-%d %H:%M}",
                    "doing": doing,
                }
            )
        )
        yield
    finally:
        run.unlink(missing_ok=True)
        released(lock, held)
        _own.difference_update((run, lock))


def clean_own():
    """Removes the locks that this process holds: where a signal ends it, it may be at any line."""
    for path in _own:
        path.unlink(missing_ok=True)


def is_held(lock: Path) -> bool:
    """Whether a process has the lock file `lock`."""
    if not lock.exists():
        return False
    try:
        released(lock, acquired(lock))
    except Timeout:
        return True
    return False


def acquired(lock: Path) -> FileLock:
    """The lock of the file `lock`, to be given back by `released`. Raises filelock's Timeout at once where
    another has it."""
    while True:
        lock.touch()
        held = FileLock(lock, timeout=0)
        # The run before may remove the file at any moment, also between our opening and locking it: then ours
        # is no lock to anybody.
        with suppress(FileNotFoundError):
            before = lock.stat()
            held.acquire()
            if os.path.samestat(before, lock.stat()):
                return held
        held.release()


def released(lock: Path, held: FileLock):
    """Gives the lock back and removes its file."""
    # Removed while held, so that nobody locks it in between; Windows removes no open file.
    if os.name != "nt":
        lock.unlink(missing_ok=True)
        held.release()
        return
    held.release()
    with suppress(OSError):
        lock.unlink()


def _who(target, run) -> str:
    try:
        found = json.loads(run.read_text())
        who = shortened(
            plain(f"process {found['pid']} on {found['host']}, since {found['since']}, {found['doing']}")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        who = "it has not said which"
    return f"{target}: another run is writing this ({who}). Wait for it or stop it, or choose another place."
