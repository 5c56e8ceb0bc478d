"""What stopped runs have left behind: `nibble clean` lists it, and removes it where it is told to."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ...kernels.operator.errors import plain, shortened
from ..calibration.file import CalibrationError, read_meta
from ..store.atomic import is_temporary, remove_temporary
from ..store.lock import LOCK, RUN, is_held
from . import unfinished


@dataclass(frozen=True)
class Leftover:
    """Files of ours that no finished result needs. kind: "unfinished", "calibration", "temporary" or "lock";
    what: for a list; held: a run is at it."""

    path: Path
    kind: str
    what: str
    nbytes: int
    changed: datetime
    held: bool

    def remove(self):
        """Removes what is ours of it, file by file; nothing of a run that is alive."""
        if self.held:
            return
        if self.kind == "unfinished":
            unfinished.remove(self.path)
        elif self.kind == "calibration":
            for file in _passes(self.path):
                file.unlink()
            if not any(self.path.iterdir()):
                self.path.rmdir()
        elif self.kind == "temporary":
            remove_temporary(self.path)
        else:
            self.path.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[Leftover]:
    """Those in `folder` and below it; of a folder of unfinished work itself, that one. Links are not
    followed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder. Name the one in which to look.")
    for at, folders, files in os.walk(folder):
        here = Path(at)
        if unfinished.is_unfinished(here):
            yield _unfinished(here)
            folders.clear()
            continue
        if (left := _calibration(here)) is not None:
            yield left
        for name in [n for n in folders if is_temporary(here / n)]:
            folders.remove(name)
            yield _temporary(here / name)
        for path in [here / n for n in sorted(files) if n.startswith(".") and n.endswith((LOCK, RUN))]:
            if (
                not is_held(path.with_name(path.name.removesuffix(RUN).removesuffix(LOCK) + LOCK))
                and path.exists()
            ):
                yield Leftover(
                    path, "lock", "of a run that was killed", _size([path]), _changed([path]), False
                )
        folders.sort()


def _unfinished(folder) -> Leftover:
    about, files = unfinished.about(folder), unfinished.files_of(folder)
    settings = about.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    pieces = sum(f.name.endswith(".safetensors") for f in files)
    method = f"{settings.get('method', 'an earlier version')}"[:40]
    lock = folder.with_name(f".{folder.name}{LOCK}")
    held = is_held(lock) or is_held(folder.with_name(f".{folder.name.removesuffix('.partial')}{LOCK}"))
    return Leftover(
        folder,
        "unfinished",
        f"{method}: {pieces} finished pieces, begun {about.get('since', 'long ago')}",
        _size(files),
        _changed(files),
        held,
    )


def _passes(folder) -> dict[Path, dict]:
    """{file: its header} of the passes of a calibration that can be read."""
    found = {}
    for file in folder.glob("pass-*.safetensors"):
        try:
            found[file] = read_meta(file)
        except CalibrationError:
            continue
    return found


def _calibration(folder) -> Leftover | None:
    """None for a finished one, which is no leftover, and where there is none."""
    if not (found := _passes(folder)):
        return None
    passes, samples = next(iter(found.values()))["passes"], sum(meta["done"] for meta in found.values())
    wanted = passes * next(iter(found.values()))["samples"]
    if samples >= wanted:
        return None
    what = f"a calibration of {samples} of {wanted} sampling runs"
    return Leftover(
        folder,
        "calibration",
        what,
        _size(found),
        _changed(found),
        is_held(folder.with_name(f".{folder.name}{LOCK}")),
    )


def _temporary(folder) -> Leftover:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return Leftover(
        folder,
        "temporary",
        "a file that was not written to its end",
        _size(files),
        _changed([folder]),
        is_held(folder / "lock"),
    )


def _size(files) -> int:
    return sum(f.stat().st_size for f in files if f.is_file())


def _changed(files) -> datetime:
    return datetime.fromtimestamp(max((f.stat().st_mtime for f in files), default=0))


def leftovers_text(found: list[Leftover]) -> str:
    """A line for each, the largest first."""
    lines = [
        (
            f"{left.nbytes / 1e6:10,.1f} MB  {left.changed:%Y-%m-%d %H:%M}  {plain(str(left.path))}  "
            f"({shortened(plain(left.what))}{'; a run is at it' if left.held else ''})"
        )
        for left in sorted(found, key=lambda left: -left.nbytes)
    ]
    return "\n".join(lines)
