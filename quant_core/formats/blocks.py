"""Finished blocks of a quantization that is under way, a file each: a killed run goes on behind them."""

import hashlib
import json
import shutil
from pathlib import Path

from ..linear import QuantizedLayer
from ..report import Row
from . import pack


class BlockStore:
    """Blocks in `folder`, which is emptied first where it belongs to a run with other `settings`."""

    def __init__(self, folder: Path, family: str, settings: dict):
        self.folder, self.family, self.settings = Path(folder), family, settings
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        marker = self.folder / "settings.sha256"
        if self.folder.exists() and not (marker.exists() and marker.read_text() == key):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(key)

    def _path(self, name) -> Path:
        return self.folder / f"{name}.safetensors"

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def save(self, name: str, layers: dict[str, QuantizedLayer], rows: list[Row]):
        pack.save(self._path(name), layers, {}, self.family, self.settings, [row.to_json() for row in rows])

    def load(self, name: str) -> tuple[dict[str, QuantizedLayer], list[Row]]:
        """(layers, memory-mapped; rows of the report)."""
        file = pack.PackFile(self._path(name))
        return {layer: file.layer(layer) for layer in file.specs}, [Row(**row) for row in file.report]

    def remove(self):
        shutil.rmtree(self.folder)
