"""A table that grows row by row: JSON that is whole after each row, gone on with by a run of the same
settings only."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from ...kernels.operator.errors import NamedError
from .atomic import save_text


class Table:
    """rows: what a run of the same `settings` has left in `path`, [] where there is none; `add` writes one
    more. Where `path` has the rows of others, which may be hours of work, it stays, and these go beside it,
    with a part of a hash in the name.

    Raises ValueError for a file that is no table.
    """

    def __init__(self, path: Path, settings: dict, what: str):
        self.path, self.what = Path(path), what
        self._key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        rows = self._read()
        if rows is None:
            self.path = self.path.with_name(f"{self.path.stem}.{self._key[:8]}{self.path.suffix}")
            rows = self._read() or []
        self.rows = rows

    def _read(self) -> list | None:
        """None where there are rows of other settings."""
        if not self.path.exists():
            return []
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            rows = list(found["layers"])
            if not all(isinstance(row, dict) for row in rows):
                raise TypeError("rows that are no objects")
            return rows if found["settings"] == self._key else None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(error) from error

    def parsed(self, row: Callable[[dict], object]) -> list:
        """row(r) of each. A row that `row` cannot take is a damaged table."""
        try:
            return [row(r) for r in self.rows]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._damaged(error) from error

    def add(self, row: dict):
        self.rows.append(row)
        save_text(self.path, json.dumps({"settings": self._key, "layers": self.rows}, indent=1) + "\n")

    def _damaged(self, error):
        return NamedError(
            f"{self.path}: not a table of {self.what} ({type(error).__name__}: {error}). Delete it to "
            "measure again."
        )
