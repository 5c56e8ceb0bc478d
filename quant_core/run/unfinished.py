"""What a quantization under way has finished, a file a layer or a block: a stopped run goes on behind them.

A folder of this kind has a marker; only files that its run has written are ever removed, one by one.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import torch
import xxhash

from ..formats import nibble
from ..layer.linear import QuantizedLayer
from ..layer.row import Row
from ..store import digests
from ..store.atomic import file_name, is_temporary, new_folder, save_text
from ..store.safe import CheckpointError
from ..store.settings import differences
from ..training.trainer import LOSSES, TRAINING

MARKER, END = "nibble-unfinished.json", ".nibble.safetensors"
FORMER = "settings.sha256"  # the marker up to 0.6
_NAMED = 3  # differences that an error names


class NotOurs(ValueError):
    """A folder of the user's where unfinished work would go."""


class OtherRun(ValueError):
    """Unfinished work of a run with other options, or from another model."""


def hash_of(tensors: Iterable[torch.Tensor]) -> str:
    """xxh3 of the tensors' dtypes, shapes and bytes, wherever they are."""
    parts = [f"{t.dtype}{tuple(t.shape)}{digests.hash_of(t.detach().cpu().contiguous())}" for t in tensors]
    return xxhash.xxh3_64_hexdigest("".join(parts).encode())


class Unfinished:
    """Units (layers or blocks) of the run of `settings`, in `folder`. kept: how many a run before has left
    there.

    Raises NotOurs for a folder without the marker that is not empty, OtherRun for one of other settings,
    naming what differs.
    """

    def __init__(self, folder: Path, family: str, settings: dict):
        self.folder, self.family, self.settings = Path(folder), family, json.loads(json.dumps(settings))
        self._key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if self.folder.exists():
            self._require_own()
        self.kept = len(list(self.folder.glob(f"*{END}")))
        if not (self.folder / MARKER).exists():
            made = {"settings": self.settings, "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
            # Never without its marker, or a run killed here would leave a folder of nobody's.
            with new_folder(self.folder) as part:
                save_text(part / MARKER, json.dumps(made, indent=1) + "\n")

    @property
    def text(self) -> str:
        """What a run before has left."""
        since = about(self.folder).get("since")
        return (
            f"{self.folder}: {self.kept} finished pieces of the run since {since} are taken over where "
            "their weights are the same"
        )

    def _require_own(self):
        remedy = (
            f"Go on with the options of that run, remove it (`nibble clean {self.folder} --remove`), or "
            "choose another place."
        )
        if (self.folder / FORMER).exists():
            raise OtherRun(f"{self.folder}: unfinished work of an earlier version of Nibble. {remedy}")
        if not self.folder.is_dir() or (any(self.folder.iterdir()) and not (self.folder / MARKER).exists()):
            raise NotOurs(
                f"{self.folder}: is in the way of unfinished work, and Nibble has not made it. Move it, or "
                "choose another place."
            )
        if (self.folder / MARKER).exists() and (found := about(self.folder)).get("settings") != self.settings:
            left = len(list(self.folder.glob(f"*{END}")))
            differ = "; ".join(differences(found.get("settings"), self.settings)[:_NAMED])
            raise OtherRun(
                f"{self.folder}: {left} finished pieces of another run, since {found.get('since')} "
                f"({differ}). {remedy}"
            )

    def take(self, unit: str, source: str) -> tuple[dict[str, QuantizedLayer], list[Row]] | None:
        """(layers, memory-mapped; rows of the report) of a unit that a run of the same settings made from
        weights of the hash `source`; None where it is to be made, damaged files among them."""
        path = self._path(unit)
        if not path.exists():
            return None
        try:
            return self._read(path, unit, source)
        except CheckpointError:
            return None

    def load(self, unit: str) -> tuple[dict[str, QuantizedLayer], list[Row]]:
        """The same of a unit that this run has taken or saved. Raises PackError where it is not there whole,
        or is another run's."""
        return self._read(self._path(unit), unit, None)

    def _read(self, path, unit, source):
        file = nibble.PackFile(path)
        found = file.provenance
        if (
            found.get("unit") != unit
            or found.get("run") != self._key
            or source not in (None, found.get("source"))
        ):
            raise nibble.PackError(
                f"{path}: belongs to another run, or to other weights, than {unit} of this one"
            )
        file.verify()
        return {layer: file.layer(layer) for layer in file.specs}, [Row.from_json(row) for row in file.report]

    def save(self, unit: str, source: str, layers: dict[str, QuantizedLayer], rows: list[Row]):
        """source: hash of the weights that it was made from."""
        made = {"unit": unit, "run": self._key, "source": source}
        nibble.save(self._path(unit), layers, {}, self.family, made, [row.to_json() for row in rows])

    def _path(self, unit) -> Path:
        return self.folder / f"{file_name(unit)}{END}"

    def remove(self):
        """Removes what runs have written here, and the folder if nothing else is in it."""
        remove(self.folder)


def about(folder: Path) -> dict:
    """What the marker of a folder says; {} where it has none that can be read."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_unfinished(folder: Path) -> bool:
    """Whether the folder has the marker of unfinished work, that of earlier versions included."""
    return (folder / MARKER).is_file() or (folder / FORMER).is_file()


def files_of(folder: Path) -> list[Path]:
    """What runs have written into a folder of unfinished work, the marker last."""
    if not is_unfinished(folder):
        return []
    former = (folder / FORMER).is_file()
    own = lambda p: p.name.endswith((END, TRAINING)) or p.name == LOSSES or (former and _nibble(p))
    temporary = [f for p in folder.iterdir() if is_temporary(p) for f in [*p.iterdir(), p]]
    return [
        *(p for p in folder.iterdir() if p.is_file() and own(p)),
        *temporary,
        *(folder / m for m in (FORMER, MARKER) if (folder / m).is_file()),
    ]


def remove(folder: Path) -> int:
    """Removes them, and the folder if nothing else is in it and it is no link; returns the bytes that became
    free."""
    freed = 0
    for path in files_of(folder):
        freed += path.stat().st_size
        path.rmdir() if path.is_dir() else path.unlink()
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        os.rmdir(folder)
    return freed


def _nibble(path) -> bool:
    """Blocks of earlier versions have no end of their own."""
    if path.suffix == ".pt":
        return True
    try:
        nibble.PackFile(path)
    except (CheckpointError, ValueError):
        return False
    return True
